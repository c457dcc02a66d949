"""Cache folders for prepared data, published atomically, with progress display and disk errors.

A folder is written under a temporary name and renamed when all of it is on the disk, so a folder with its final name is
complete, however many processes prepare at once::

    <cache>/<task>/<key>/                           prepared
    <cache>/<task>/.<key>.<random>/      being written, and its lock, .<key>.<random>.lock

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bigmodel.data.lock import Held, Lock

LINE_SECONDS = 10.0  # between lines of progress without a terminal
_ABANDONED = 86400.0  # seconds since the last change of a folder without a lock


def cache_folder(task: str, cache_dir: str | None = None) -> Path:
    """Return a task's folder in `cache_dir`, else in $BIGMODEL_CACHE, else in ~/.cache/bigmodel."""
    root = cache_dir or os.environ.get("BIGMODEL_CACHE") or "~/.cache/bigmodel"
    return Path(root).expanduser() / task


def digest(value: object) -> str:
    """Return 32 hexadecimal digits that identify a value of plain types, used as cache key."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def dumps(value: object) -> str:
    """Return a value as JSON, after a line with the CRC-32 of the JSON."""
    text = json.dumps(value)
    return f"{zlib.crc32(text.encode()):08x}\n{text}"


def loads(text: str) -> Any:
    """Return the value that `dumps` wrote, or the earlier JSON of a list, without CRC-32.

    Raises:
        ValueError: if the text is damaged.
    """
    if text.startswith("["):
        return json.loads(text)
    crc, _, content = text.partition("\n")
    if crc != f"{zlib.crc32(content.encode()):08x}":
        raise ValueError("the CRC-32 does not match")
    return json.loads(content)


def file_hashes(files: Sequence[str], cache: Path) -> list[str]:
    """Return the SHA-256 of each file's content, cached in `cache` until a file changes.

    Raises:
        ValueError: if a file cannot be read.
    """
    stats = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    memory = cache / "scans" / f"{digest(stats)}.json"
    try:
        hashes: list[str] = loads(memory.read_text())
        if not isinstance(hashes, list) or len(hashes) != len(files):
            raise ValueError("damaged")
    except (OSError, ValueError):
        hashes = [_sha256(file) for file in files]
        with disk_errors(cache):
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_suffix(f".{secrets.token_hex(8)}")
            partial.write_text(dumps(hashes))
            partial.replace(memory)
    return hashes


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """Create a temporary folder to fill; rename it to `final` if the block succeeds, and remove it otherwise.

    Any number of processes may fill one each: the first to finish gets the name. Each holds a lock next to its folder;
    folders whose lock is free are remains of killed processes, and are removed.
    """
    folder = final.with_name(f".{final.name}.{secrets.token_hex(8)}")
    lock: Lock | None = None
    try:
        with disk_errors(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
            _remove_remains(final)
            lock = Lock(_lock_of(folder))
            folder.mkdir()
        yield folder
        publish(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            _lock_of(folder).unlink(missing_ok=True)
            lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array as .npy and flush it to the disk."""
    with open(path, "wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())


def publish(folder: Path, final: Path) -> None:
    """Rename a complete folder to its final name, unless another process did so first."""
    _sync(folder)
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    _sync(final.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _remove_remains(final: Path) -> None:
    """Remove folders of killed processes."""
    for folder in final.parent.glob(f".{final.name}.*"):
        if not folder.is_dir() or not _lock_of(folder).exists():
            earlier = re.fullmatch(r".*\.\d+", folder.name) and folder.is_dir()  # an earlier version wrote no lock
            if earlier and time.time() - folder.stat().st_mtime > _ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            lock = Lock(_lock_of(folder))
        except (Held, OSError):
            continue
        shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it too
        _lock_of(folder).unlink(missing_ok=True)
        lock.release()


@contextmanager
def disk_errors(cache: Path, needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Convert errors of a full or read-only disk to one that names the flag to set. `needed`: estimated total bytes."""
    flag = "set --data.cache_dir to another folder"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            amount = f"; about {needed() / 1e6:,.1f} MB are needed" if needed() else ""
            message = f"no space left for prepared data in {cache}{amount}: make room, or {flag}"
            raise OSError(error.errno, message) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ValueError(f"prepared data cannot be written to {cache} ({error.strerror}): {flag}") from error
        raise


def say(line: str) -> None:
    """Print a line for the user, to standard error."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(line, markup=False)


def first_of(names: Sequence[str], most: int) -> str:
    """Format names for a line or a message: `a, b and 5 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@contextmanager
def progress(what: str, total: int, unit: str = "MB") -> Iterator[Callable[[int], None]]:
    """Show a progress bar, or lines at intervals without a terminal; yields a function to call with the amount done.

    Args:
        what: the description of the work.
        total: the total amount.
        unit: its unit; with MB, amounts are in bytes.
    """
    scale, digits = (1e6, 1) if unit == "MB" else (1.0, 0)
    console = Console(stderr=True)
    began = shown = time.monotonic()
    done = 0

    def line() -> str:
        speed = done / scale / max(time.monotonic() - began, 1e-3)
        of_total = f"{done / scale:,.{digits}f} of {total / scale:,.{digits}f} {unit}"
        return f"{what}: {of_total}, {speed:,.{digits}f} {unit}/s"

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            bar.update(task, completed=done, description=line())
            if bar.disable and time.monotonic() - shown > LINE_SECONDS:
                shown = time.monotonic()
                say(line())

        yield advance
