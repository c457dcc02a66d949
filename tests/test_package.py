"""The wheel and the source distribution hold all that the package needs outside a checkout."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import bigmodel

ROOT = Path(__file__).parents[1]
BUILD = (
    "import sys; from setuptools import build_meta as b; print(*[getattr(b, 'build_' + k)('.') for k in sys.argv[1:]])"
)


def build(folder, *kinds):
    """Files of these kinds, as any installer has them built, without a network."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, *kinds], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return [folder / name for name in result.stdout.splitlines()[-1].split()]


def contents(wheel):
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, and the source distribution unpacked."""
    folder = tmp_path_factory.mktemp("package") / "source"
    folder.mkdir()
    for name in ("bigmodel", "experiments"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    wheel, source = build(folder, "wheel", "sdist")
    with tarfile.open(source) as file:
        file.extractall(folder.parent, filter="data")
    return wheel, folder.parent / source.name.removesuffix(".tar.gz")


def test_the_wheel_holds_everything(built):
    files = contents(built[0])
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "bigmodel").rglob("*.*") if path.is_file()}
    inside |= {f"bigmodel/{path.relative_to(ROOT)}" for path in (ROOT / "experiments").rglob("*.*") if path.is_file()}
    needed = {path for path in inside if not re.search(r"__pycache__|\.png$", path)}
    assert needed <= files, sorted(needed - files)
    others = {path for path in files - needed if not path.startswith(f"bigmodel-{bigmodel.__version__}.dist-info/")}
    assert not others
    assert {"bigmodel/py.typed", "bigmodel/defaults.yaml", "bigmodel/cli/template/my_task/experiment.yaml"} <= files
    assert f"bigmodel-{bigmodel.__version__}.dist-info/licenses/LICENSE" in files


def test_the_source_distribution_makes_the_same_wheel(built):
    wheel, source = built
    (again,) = build(source, "wheel")
    assert contents(again) == contents(wheel)
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(again) as b:
        name = "bigmodel/experiments/language_modeling/stdlib.yaml"
        assert a.read(name) == b.read(name) == (ROOT / "experiments/language_modeling/stdlib.yaml").read_bytes()


def test_it_works_outside_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built[0]) as file:
        file.extractall(tmp_path / "site")
    others = [path for path in sys.path if path and ROOT not in (Path(path), *Path(path).parents)]
    environment = {"PYTHONPATH": ":".join([str(tmp_path / "site"), *others])}

    def typed(*words):
        command = [sys.executable, "-m", "bigmodel", *words]
        return subprocess.check_output(command, cwd=tmp_path, env=environment, text=True)

    assert typed("--version") == f"bigmodel {bigmodel.__version__}\n"
    assert "experiments/language_modeling/stdlib.yaml" in typed("list")
    typed("new", "bird_songs")
    assert (tmp_path / "bird_songs" / "bird_songs" / "experiment.yaml").is_file()
    resolved = typed("fit", "-c", "experiments/language_modeling/stdlib.yaml", "--print_config")
    assert "experiment: language_modeling/stdlib" in resolved
