"""What data are prepared in and with: a folder that is whole as soon as it has its name, progress, errors of the disk.

A folder is written beside its final name and renamed when all of it is on the disk, so what has the final name is whole,
however many processes prepare at once::

    <cache>/<task>/<key>/                           prepared
    <cache>/<task>/.<key>.<host>.<process id>/      being written

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


def cache_folder(task: str, cache_dir: str | None = None) -> Path:
    """A task's folder in `cache_dir`, else in $BIGMODEL_CACHE, else in ~/.cache/bigmodel."""
    root = cache_dir or os.environ.get("BIGMODEL_CACHE") or "~/.cache/bigmodel"
    return Path(root).expanduser() / task


def digest(value: object) -> str:
    """32 hexadecimal digits that stand for a value of plain types: the key of what was made from it."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def file_hashes(files: Sequence[str], cache: Path) -> list[str]:
    """SHA-256 of each file's content, remembered in `cache` until a file changes.

    Raises:
        ValueError: if a file cannot be read.
    """
    stats = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    memory = cache / "scans" / f"{digest(stats)}.json"
    try:
        hashes: list[str] = json.loads(memory.read_text())
    except (OSError, json.JSONDecodeError):
        hashes = [_sha256(file) for file in files]
        with disk_errors(cache):
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(hashes))
            partial.replace(memory)
    return hashes


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def building(final: Path) -> Iterator[Path]:
    """A new folder to be filled; it takes the name `final` when the block ends well, and is removed when it does not.

    Any number of processes may fill one each: the first to end gives it the name. What a killed process of this machine
    left behind is removed.
    """
    _remove_remains(final)
    folder = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with disk_errors(final.parent):
            folder.mkdir(parents=True)
        yield folder
        publish(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file through to the disk."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array through to the disk, as .npy."""
    with open(path, "wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())


def publish(folder: Path, final: Path) -> None:
    """Give a whole folder its final name, unless another process was first."""
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


def _remove_remains(final: Path) -> None:
    """Remove what a killed process of this machine left behind."""
    for folder in final.parent.glob(f".{final.name}.{socket.gethostname()}.*"):
        if not _alive(int(folder.suffix[1:])):
            shutil.rmtree(folder, ignore_errors=True)  # another process may be at it too


def _alive(process: int) -> bool:
    """Whether another process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


@contextmanager
def disk_errors(cache: Path, needed: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turn a full or closed disk into an error that says what to do. `needed`: bytes in all, as far as is known."""
    flag = "set --data.cache_dir to another place"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            amount = f"; about {needed() / 1e6:,.1f} MB are needed" if needed() else ""
            message = f"no space left for prepared data in {cache}{amount}: make room, or {flag}"
            raise OSError(error.errno, message) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ValueError(f"prepared data cannot be kept in {cache} ({error.strerror}): {flag}") from error
        raise


def say(line: str) -> None:
    """A line for the person at the terminal."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(line, markup=False)


def first_of(names: Sequence[str], most: int) -> str:
    """Names for a line or a message: `a, b and 5 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@contextmanager
def progress(what: str, total: int, unit: str = "MB") -> Iterator[Callable[[int], None]]:
    """A progress bar; without a terminal, a line now and then. Gives a function to call with what was done.

    Args:
        what: is being done.
        total: of what is counted.
        unit: its name; with MB, bytes are counted.
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
