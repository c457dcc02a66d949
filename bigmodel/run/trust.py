"""Import paths that the configuration in a run or a checkpoint may name.

Running an experiment file (`fit -c`) runs the code that it names. Loading a run, which may come from somebody else, must
not: its configuration may name classes of bigmodel, torch.nn, torch.optim and Lightning's callbacks and strategies, of
packages with a registered task (entry points of the group `bigmodel.tasks`), and whatever the caller trusts. Nothing else
is imported, and functions are refused, because jsonargparse would call them with any arguments.

What a person names in an experiment of their own is allowed from then on, in a list in the cache (`trust/imports.txt`):
without it, a run with a net of one's own module could be trained, and not be loaded again.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bigmodel.data.cache import cache_folder

TASK_GROUP = "bigmodel.tasks"  # entry points of installed tasks
_ALLOWED = (
    *(f"bigmodel.{package}" for package in ("data", "evaluation", "nn", "parallel", "pretrained", "tasks", "training")),
    "torch.nn",
    "torch.optim",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.strategies",
)
_NOT_ALLOWED = (
    "which is not in torch.nn, torch.optim, a package with a registered task, Lightning's callbacks and strategies, or"
    " bigmodel's classes"
)
_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_trusted: set[str] = set()  # by callers of `trusting`
_run_here: set[str] = set()  # by `remember`, in this process


class UntrustedImport(ValueError):
    """A configuration from a run or a checkpoint names code that is not allowed.

    Attributes:
        path: the import path.
        key: where it stands, such as `model.net`.
    """

    def __init__(self, path: str, key: str, reason: str) -> None:
        self.path, self.key = path, key
        super().__init__(
            f"the saved configuration names {path!r}{f' at {key}' if key else ''}, {reason}: loading it could run any code."
            f" If you trust its author, allow it by --trust {path} (in Python, trust=[{path!r}])"
        )


@functools.cache
def task_packages() -> frozenset[str]:
    """Return the top-level packages with a registered task, besides bigmodel."""
    entries = importlib.metadata.entry_points(group=TASK_GROUP)
    return frozenset(entry.value.split(":")[0].split(".")[0] for entry in entries) - {"bigmodel"}


@contextmanager
def trusting(paths: Iterable[str]) -> Iterator[None]:
    """Allow configurations of runs and checkpoints to name these modules, packages, classes or functions as well."""
    if isinstance(paths, str):
        raise ValueError(f"trust {paths!r}: give a list of import paths, such as [{paths!r}]")
    added = set(paths) - _trusted
    _trusted.update(added)
    try:
        yield
    finally:
        _trusted.difference_update(added)


def remember(paths: Iterable[str]) -> None:
    """Allow import paths from now on, on this machine: exactly those that an experiment of a person's own names."""
    new = sorted({path for path in paths if _PATH.fullmatch(path) and not _is_allowed(path)} - _remembered())
    _run_here.update(new)
    if new:
        file = _file()
        with suppress(OSError):  # a read-only home
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{path}\n" for path in new))


def imported_paths(tree: Any, parsed: Any) -> set[str]:
    """Return the import paths in a configuration: class paths, and text that jsonargparse has made a callable or a class.

    Args:
        tree: the configuration, as plain values.
        parsed: what jsonargparse has made of it, with the same keys.
    """
    found: set[str] = set()
    if isinstance(tree, dict):
        if isinstance(tree.get("class_path"), str):
            found.add(tree["class_path"])
        for name, value in tree.items():
            inner = parsed[name] if hasattr(parsed, "__contains__") and name in parsed else None
            found |= imported_paths(value, inner)
    elif isinstance(tree, list):
        inners = parsed if isinstance(parsed, list | tuple) and len(parsed) == len(tree) else [None] * len(tree)
        for value, inner in zip(tree, inners, strict=True):
            found |= imported_paths(value, inner)
    elif isinstance(tree, str) and (callable(parsed) or hasattr(parsed, "class_path")):
        found.add(tree)
    return found


def _file() -> Path:
    return cache_folder("trust") / "imports.txt"


def _remembered() -> set[str]:
    """Return the exact import paths of `remember`."""
    try:
        return _run_here | set(_file().read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError):
        return _run_here


def _is_allowed(path: str) -> bool:
    return any(path == entry or path.startswith(f"{entry}.") for entry in (*_ALLOWED, *task_packages()))


def _is_trusted(path: str) -> bool:
    return path in _remembered() or any(path == entry or path.startswith(f"{entry}.") for entry in _trusted)


def _paths(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each class path in a configuration with its key."""
    if isinstance(tree, dict):
        if isinstance(path := tree.get("class_path"), str):
            yield key, path
        for name, value in tree.items():
            if name != "class_path":
                yield from _paths(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            yield from _paths(value, key)


def trust_packages_of(tree: Any) -> None:
    """Allow, in this process, the packages that a person names in files and flags beside a run's configuration.

    A class may be named by its path alone, as in `--model.net my_package.Net`; text below `data`, such as a path, is none.
    """
    named = {path for _, path in _paths(tree)}
    named |= {path for key, path in _strings(tree) if _PATH.fullmatch(path) and not key.startswith("data.")}
    packages = {path.split(".")[0] for path in named if "." in path and not _is_allowed(path)}
    _trusted.update(package for package in packages if importlib.util.find_spec(package) is not None)


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each string in a configuration, a class path or not, with its key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _strings(value, key if name in ("class_path", "init_args") else f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, key)
    elif isinstance(tree, str):
        yield key, tree


def check_imports(tree: Any, key: str = "") -> None:
    """Check all import paths in a configuration from a run or a checkpoint, before anything is imported.

    Args:
        tree: the configuration, as plain values.
        key: its place in the whole configuration.

    Raises:
        UntrustedImport: for a class path outside of what is allowed, or an allowed path of something else than a class.
    """
    for place, path in _paths(tree, key):
        if "." in path and not (_is_allowed(path) or _is_trusted(path)):
            raise UntrustedImport(path, place, _NOT_ALLOWED)
    for place, path in _strings(tree, key):  # a callable may be given by its path alone
        if _PATH.fullmatch(path) and _is_allowed(path) and not _is_trusted(path):
            found = _resolve(path)
            if found is not None and not (
                inspect.isclass(found) and _is_allowed(f"{found.__module__}.{found.__name__}")
            ):
                raise UntrustedImport(path, place, "which is not a class defined in an allowed package")


def _resolve(path: str) -> Any:
    """Return the object at an allowed import path; None for a module, or if there is none."""
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        for name in parts[n:]:
            found = getattr(found, name, None)
        return None if inspect.ismodule(found) else found
    return None


def import_saved_class(path: str) -> Any:
    """Return the class at `package.module.Class`, a path that a checkpoint names.

    Raises:
        UntrustedImport: if it is not allowed.
        ValueError: if there is no such class.
    """
    check_imports({"class_path": path})
    found = _resolve(path)
    if not inspect.isclass(found):
        raise ValueError(f"the checkpoint names the class {path!r}, which is not installed")
    return found


@contextmanager
def restricted_imports(tree: Any, key: str = "") -> Iterator[None]:
    """Let jsonargparse import nothing but what is allowed or trusted.

    Args:
        tree: the configuration that it parses, as plain values.
        key: its place in the whole configuration, for the message.

    Raises:
        UntrustedImport: for the first import of anything else.
        ValueError: for any other error of jsonargparse.
    """
    from jsonargparse import set_parsing_settings

    from bigmodel.internals import parsing_settings  # imports torch

    trusted = {path for _, path in _strings(tree) if _PATH.fullmatch(path) and _is_trusted(path)}
    # jsonargparse also checks the place where an object is defined.
    defined = {
        f"{found.__module__}.{found.__qualname__}"
        for path in trusted
        if hasattr(found := _resolve(path), "__qualname__")
    }
    names = {*_trusted, *trusted, *(path for path in defined if _PATH.fullmatch(path))}
    allowed = [*_ALLOWED, *task_packages(), *sorted(names)]
    settings = parsing_settings()
    before = dict(settings)
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=allowed, instantiate_subclass_spec_in_any=False
    )
    try:
        yield
    except ArgumentError as error:  # a path given alone, as in `net: os.system`, is found only where it is imported
        denied = re.search(r"Importing '([\w.]+)' is not allowed", str(error))
        if denied is None:
            raise ValueError(f"the saved configuration{f' of {key}' if key else ''} is not valid: {error}") from error
        raise UntrustedImport(denied[1], key, _NOT_ALLOWED) from error
    finally:
        settings.clear()
        settings.update(before)
