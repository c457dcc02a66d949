"""Installed tasks, and the experiments in their packages: from metadata and files only.

A package registers its tasks as entry points of the group `bigmodel.tasks`, `name = "package.module:Class"`.
Experiments are YAML files inside the package: `package/experiment.yaml`, and all below `package/experiments/`. They are
named by their path relative to the package's parent folder; bigmodel's own also by `experiments/...`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from bigmodel.data.text import did_you_mean
from bigmodel.run.config import read_yaml

GROUP = "bigmodel.tasks"


@dataclass(frozen=True)
class InstalledTask:
    """Task registered by a package.

    Attributes:
        name: its registered name.
        path: its import path, `package.module.Class`.
        package: name and version of the distribution, as in `my_task 0.1.0`; empty if unknown.
        entry_point: imports it.
    """

    name: str
    path: str
    package: str
    entry_point: EntryPoint

    @property
    def top(self) -> str:
        """Top-level package of its import path."""
        return self.path.split(".")[0]


@functools.cache
def installed_tasks() -> tuple[InstalledTask, ...]:
    """Return all registered tasks, by name; names may be duplicated."""
    found = []
    for entry in importlib.metadata.entry_points(group=GROUP):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
        found.append(InstalledTask(entry.name, entry.value.split("[")[0].strip().replace(":", "."), package, entry))
    return tuple(sorted(found, key=lambda task: (task.name, task.path)))


def find_task(name: str) -> InstalledTask | None:
    """Return the task of this name, or of this import path; None if it is not registered.

    Raises:
        ValueError: if several packages have one of this name.
    """
    found = [task for task in installed_tasks() if name in (task.name, task.path)]
    exact = [task for task in found if task.path == name]
    if len({task.path for task in exact or found}) > 1:
        paths = " or ".join(task.path for task in found)
        raise ValueError(f"several packages have a task {name!r}: use {paths}")
    return next(iter(exact or found), None)


@functools.cache
def package_folder(package: str) -> Path | None:
    """Return the folder of a top-level package; None if it is not installed, or not a folder."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # raised for modules created at runtime
        return None
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(folders[0]) if folders else None


def installed_experiments() -> list[tuple[str, Path]]:
    """Return the experiments of all packages with tasks: the argument for `-c`, and the file."""
    found = []
    for package in sorted({"bigmodel", *(task.top for task in installed_tasks())}):
        folder = package_folder(package)
        if folder is not None:
            paths = [*sorted(folder.glob("experiment.yaml")), *sorted(folder.glob("experiments/**/*.yaml"))]
            above = folder if package == "bigmodel" else folder.parent  # its own are named experiments/...
            found += [(str(path.relative_to(above)), path) for path in paths]
    return found


def find_experiment(name: str) -> Path | None:
    """Return the packaged experiment of this name, used if `-c name` is not a file; None if there is none."""
    first, *rest = Path(name).parts or ("",)
    packages = {"bigmodel", *(task.top for task in installed_tasks())}
    if first == "experiments":
        first, rest = "bigmodel", [first, *rest]
    folder = package_folder(first) if first in packages else None
    path = folder.joinpath(*rest) if folder is not None and ".." not in rest else None
    return path if path is not None and path.is_file() else None


def read_experiment(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the file of `-c name`, and its content: a path, or an experiment inside a package.

    Raises:
        ValueError: if it is neither, or cannot be read.
    """
    path = Path(name)
    inside = find_experiment(name) if not path.exists() else None
    if inside is None and not path.exists():
        folder = path.parts[0] if path.parts else ""
        hint = f" (is {folder} installed? `{_install(folder)}`)" if (Path(folder) / "pyproject.toml").is_file() else ""
        raise ValueError(
            f"the configuration {name} cannot be read: there is no such file, neither here nor in an installed package with"
            f" a task{hint}; `bigmodel list` shows the experiments"
        )
    return inside or path, read_yaml(inside or path)


def experiment_of(task: InstalledTask) -> Path | None:
    """Return the example experiment of a task; None if there is none.

    It is `experiment.yaml` in the folder of its module or one above, or `experiments/<name>/check.yaml` in its package.
    """
    folder = package_folder(task.top)
    if folder is None:
        return None
    module = task.path.split(".")[1:-1]
    inside = [folder.joinpath(*module[:depth], "experiment.yaml") for depth in range(len(module), -1, -1)]
    return next((p for p in (*inside, folder / "experiments" / task.name / "check.yaml") if p.is_file()), None)


def import_class(path: str) -> Any:
    """Return the object at `package.module.Class`; exceptions of the package's own code propagate."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def find_class(path: str) -> Any:
    """Return the object at `package.module.Class`; None if there is none."""
    try:
        return import_class(path)
    except (ImportError, AttributeError):
        return None


def check_classes(settings: Any, folders: Sequence[Path], key: str = "") -> None:
    """Check that the modules of all configured classes can be found, without importing them.

    A module that is not installed is searched in the folders, and the one that has it is appended to `sys.path`.

    Args:
        settings: merged settings, as plain values.
        folders: those of the YAML files, and the current one.
        key: where the settings stand.

    Raises:
        ValueError: if one is not found; the message names where it was searched, and a package with such a task, if known.
    """
    if not isinstance(settings, dict):
        return
    path = settings.get("class_path")
    if isinstance(path, str) and "." in path and not _is_installed(path) and not _add_folder(path, folders):
        raise ValueError(
            f"--{key} {path}: there is no module {path.split('.')[0]!r}. {_suggest_package(path, folders)}"
        )
    for name, value in settings.items():
        inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        if isinstance(value, str) and (key == "callbacks" or inner in ("model", "data")):
            value = {"class_path": value}  # short for a class without arguments
        check_classes(value, folders, inner)


def _add_folder(class_path: str, folders: Sequence[Path]) -> bool:
    """Append to `sys.path` the first folder that has the module of a class; False if there is none."""
    name = class_path.split(".")[0]
    for folder in folders:
        if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file():
            sys.path.append(str(folder.resolve()))
            importlib.invalidate_caches()
            return True
    return False


def resolve_aliases(config: Any) -> None:
    """Replace short names by class paths if they have arguments, as in `--model.method lora --model.method.rank 16`.

    A class that accepts a short name or an object has an attribute `aliases`: by argument, the class path of each name.
    """
    if not isinstance(config, dict):
        return
    arguments = config.get("init_args") or {}
    for name, value in arguments.items():
        alias = value.get("class_path") if isinstance(value, dict) else None
        if isinstance(alias, str) and "." not in alias:
            choices = getattr(import_class(config["class_path"]), "aliases", {}).get(name, {})
            if choices and alias not in choices:
                raise ValueError(f"--...{name} {alias}: choose {', '.join(choices)}, or give a class_path")
            value["class_path"] = choices.get(alias, alias)
    for value in config.values():
        resolve_aliases(value)


def _is_installed(class_path: str) -> bool:
    """True if the package of a class is installed.

    A folder of its name without an __init__.py, possibly a project's own, counts only if it contains the module.
    """
    package, module, *_ = class_path.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is not None or not spec.submodule_search_locations:
        return spec is not None
    paths = [Path(folder, module) for folder in spec.submodule_search_locations]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)


def _suggest_package(class_path: str, folders: Sequence[Path]) -> str:
    package, *_, name = class_path.split(".")
    candidates = [task for task in installed_tasks() if task.name == package or task.path.split(".")[-1] == name]
    if candidates:
        return f"{candidates[0].package} has {candidates[0].path}: to use it, set --model.class_path"
    if (Path(package) / "pyproject.toml").is_file():
        return f"Install the project in the folder {package}: `{_install(package)}`"
    names = [task.name for task in installed_tasks()]
    where = " and ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    near = did_you_mean(package, [*names, *(task.top for task in installed_tasks()), "bigmodel", "torch", "lightning"])
    return (
        f"Searched were the installed packages and {where}: put {package}.py there, or install its package{near or '.'}"
        f" Installed tasks: {', '.join(dict.fromkeys(names))}"
    )


def _install(folder: str) -> str:
    """Return the command that installs the project in a folder; never one for a name, which anybody may have registered."""
    return f"pip install -e ./{folder}"
