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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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


def new_session(started: str, step: int) -> dict[str, Any]:
    """Return the entry of this process: command, revision, host and package versions.

    Args:
        started: the time, in ISO format.
        step: the optimizer step from which it continues.
    """
    return {
        "started": started,
        "step": step,
        "command": shlex.join(sys.argv),
        "git": _git_revision(),
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _git_revision() -> str | None:
    """Return the revision of the working directory, `+changes` appended if it is modified; None outside a repository."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changed.strip() else "")
