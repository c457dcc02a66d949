"""`bigmodel new NAME`: a package with a task that trains, as a starting point for a new task.

Its source is in `template/`, as a package called my_task with a class MyTask; these two names are replaced.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import os
import re
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from bigmodel.data.text import print_text
from bigmodel.run.config import parse_flags

_HELP = """\
bigmodel new NAME [--into DIR]

Creates a folder DIR/NAME (default of DIR: the current folder) with an installable package of that name: a task that trains,
its data, an experiment, tests and a README.

  pip install -e NAME
  bigmodel fit -c NAME/experiment.yaml
"""


def run_new(argv: list[str]) -> None:
    """Write the package, and print the next commands.

    Raises:
        ValueError: for an invalid or taken name, or a folder that exists.
    """
    if {"-h", "--help"} & set(argv):
        print_text(_HELP, end="")
        return
    positional, files, pairs = parse_flags(argv)
    unknown = dict(pairs).keys() - {"into"}
    if len(positional) != 1 or files or unknown:
        problem = f"no flag --{unknown.pop()}; " if unknown else ""
        raise ValueError(f"{problem}name one package, as in `bigmodel new my_task [--into DIR]`")
    name, into = positional[0], Path(dict(pairs).get("into", "."))
    folder = into / name
    _check_name(name)
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists and is not overwritten; choose another name, or another folder with --into")
    _check_free(name)
    write_package(name, folder)
    print_text(f"wrote {folder}/\n  pip install -e {folder}\n  bigmodel fit -c {name}/experiment.yaml")
    print_text(
        f"then change data.py, module.py and experiment.yaml in {folder / name}/ one by one, and after each change run"
    )
    print_text(f"  bigmodel check-task {name}")


def _check_name(name: str) -> None:
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name):
        return
    valid = re.sub(r"\W+", "_", name).strip("_").lower()
    if keyword.iskeyword(valid) or not re.match(r"[a-z]", valid):
        valid = f"{valid.lstrip('0123456789_')}_task".lstrip("_")
    raise ValueError(
        f"{name!r} is not a valid package name: lowercase letters, digits and _ are accepted, a letter first, except Python"
        f" keywords; for example {valid}"
    )


def _check_free(name: str) -> None:
    """Raise if another package or task has this name: one would hide the other."""
    if importlib.util.find_spec(name) is not None:
        raise ValueError(f"a package {name!r} is installed already; choose another name")
    for task in importlib.metadata.entry_points(group="bigmodel.tasks", name=name):
        raise ValueError(f"a task {name!r} is installed already ({task.value}); choose another name")


def write_package(name: str, folder: Path) -> None:
    """Write the template's files under another name, completely or not at all.

    Args:
        name: of the package, such as `my_task`; the class is then called `MyTask`.
        folder: the target, which must not exist.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as partial:
            whole = Path(partial) / name  # a new folder, for the usual permissions
            whole.mkdir()
            _write(resources.files("bigmodel") / "cli" / "template", whole, name)
            os.rename(whole, folder)
    except OSError as error:
        raise ValueError(f"--into {folder.parent}: the folder is not writable ({error.strerror})") from error


def _write(template: Traversable, to: Path, name: str) -> None:
    for source in template.iterdir():
        if source.name == "__pycache__":
            continue
        target = to / renamed(source.name, name)
        if source.is_dir():
            target.mkdir()
            _write(source, target, name)
        else:
            target.write_text(renamed(source.read_text(encoding="utf-8"), name), encoding="utf-8")


def renamed(text: str, name: str) -> str:
    """Return a text of the template for a package of this name."""
    class_name = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    return text.replace("my_task", name).replace("MyTask", class_name)
