"""The record of a run, run.json: sessions, status, step, best metric."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bigmodel.run.secrets import mask_command

_PACKAGES = ("bigmodel", "torch", "lightning", "torchmetrics", "transformers", "tokenizers", "wandb", "numpy")


def read_record(directory: Path) -> dict[str, Any]:
    """Return the record in a run directory; empty if there is none.

    For a damaged one, a line is printed, and what the directory itself says is returned: the time of its creation, and the
    status `damaged`. The next session of the run writes a whole one.
    """
    path = directory / "run.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or not isinstance(record.get("created"), str) or "status" not in record:
            raise ValueError("it lacks its entries")
    except (ValueError, OSError) as error:
        print(f"{path} is damaged ({error}); `bigmodel fit --resume {directory}` writes it anew", file=sys.stderr)
        return {"created": _time_in_name(directory), "status": "damaged"}
    return record


def _time_in_name(directory: Path) -> str:
    """Return the time in a directory's name, in ISO format and UTC; empty if there is none."""
    try:
        return datetime.strptime(directory.name[:15], "%Y%m%d-%H%M%S").astimezone(UTC).isoformat()
    except ValueError:
        return ""


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write the record atomically."""
    replace_text(directory / "run.json", json.dumps(record, indent=2))


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically: if the process is killed, the old file is still complete."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; on a full disk, over the old content, which needs no space if it is not much shorter."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not path.exists():
            raise
        with open(path, "r+b") as file:
            file.write(content)
            file.truncate()


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
