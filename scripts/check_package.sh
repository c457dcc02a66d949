#!/usr/bin/env bash
# Test of the package: build the wheel, install it into a new environment, and use it from another folder.
#     scripts/check_package.sh [PYTHON]
# PYTHON (default: python) lends what bigmodel needs, so that nothing is downloaded; the extras are hidden. A minute.
set -euo pipefail
python=$(realpath --no-symlinks "$(command -v "${1:-python}")")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 WANDB_MODE=disabled OMP_NUM_THREADS=1
unset PYTHONPATH

mkdir "$work/source"
cp -a "$root"/{bigmodel,experiments,pyproject.toml,README.md,LICENSE} "$work/source"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$work/source"

"$python" -m venv --without-pip "$work/env"
site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/lent.pth"
echo 'import sys; sys.modules.update(dict.fromkeys(["mlxtend", "sklearn", "datasets", "accelerate"]))' > "$site/no_extras.pth"
install() {
    "$python" -m pip --python "$work/env/bin/python" install --quiet --no-deps --no-build-isolation --ignore-installed "$@"
}
install "$work"/bigmodel-*.whl

cd "$work"
PATH="$work/env/bin:$PATH"
python -c 'import bigmodel, sys; sys.exit(0 if bigmodel.__file__.startswith(sys.prefix) else bigmodel.__file__)'
bigmodel new my_task
install --editable ./my_task
python -m bigmodel list
python -m pytest -q my_task/tests # from the folder above, which holds a folder my_task as well
bigmodel fit -c my_task/experiment.yaml --trainer.max_steps 20 --trainer.accelerator cpu
bigmodel fit -c experiments/language_modeling/check.yaml --data.cache_dir cache --trainer.accelerator cpu
bigmodel generate last --prompt 'import ' --max_new_tokens 8 --device cpu
echo "the package works as installed"
