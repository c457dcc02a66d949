"""The record of a run, run.json: sessions, status, step, best metric."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bigmodel.run.secrets import mask_command

_PACKAGES = ("bigmodel", "torch", "lightning", "torchmetrics", "transformers", "tokenizers", "wandb", "numpy")


def read_record(directory: Path) -> dict[str, Any]:
    """Return the record in a run directory; empty if there is none."""
    path = directory / "run.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the record atomically."""
    replace_text(directory / "run.json", json.dumps(record, indent=2))


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: if the process is killed, the old file is still complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def new_session(started: str, step: int, class_paths: Iterable[str] = ()) -> dict[str, Any]:
    """Return the entry of this process: command, revision, host and package versions.

    Args:
        started: the time, in ISO format.
        step: the optimizer step from which it continues.
        class_paths: the classes of the task and its data, of which the packages and their revisions are recorded.
    """
    return {
        "started": started,
        "step": step,
        "command": shlex.join(mask_command(sys.argv)),
        "git": _git_revision(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "plugins": dict(_plugin(path.split(".")[0]) for path in class_paths),
    }


def _plugin(package: str) -> tuple[str, dict[str, str | None]]:
    """Return a top-level package, and the names, version and revision of what is installed under it."""
    names = sorted(set(importlib.metadata.packages_distributions().get(package, [])))
    file = getattr(sys.modules.get(package), "__file__", None)
    return package, {
        "distribution": ", ".join(names) or None,
        "version": importlib.metadata.version(names[0]) if names else None,
        "git": _git_revision(Path(file).parent) if file else None,
    }


def _git_revision(folder: Path | None = None) -> str | None:
    """Return the revision of a folder, `+changes` appended if it is modified; None outside a repository.

    Args:
        folder: None: the working directory.
    """
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changed.strip() else "")
