"""Checkpoint in one file: written to a temporary file, with its checksum inside, and renamed to its target.

A file is the zip archive that `torch.save` writes, and the archive's comment is its SHA-256:

    the archive, up to the two bytes that give the comment's length | 71 | sha256:<64 hexadecimal digits>

The digest is that of the archive as torch wrote it, where the length is 0. So one rename publishes file and checksum
together, they stay together however the file is copied, and torch, zipfile and unzip read it like any archive.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

_END = b"PK\x05\x06"  # starts the last record of a zip archive: 22 bytes, the last two are the comment's length
_END_SIZE = 22
_MARK = b"sha256:"
_COMMENT_SIZE = len(_MARK) + 64
_BLOCK = 1 << 20  # bytes


class _HashedFile:
    """File open for writing and reading, hashed while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> None:
        """Write the digest as the comment of the completed archive."""
        comment = _MARK + self._sha256.hexdigest().encode()
        self._file.seek(-_END_SIZE, os.SEEK_END)
        end = self._file.read(_END_SIZE)
        assert end.startswith(_END), end
        assert end.endswith(b"\0\0"), end
        self._file.seek(-2, os.SEEK_END)
        self._file.write(len(comment).to_bytes(2, "little") + comment)


def write_archive(target: Path, fill: Callable[[Any], object]) -> None:
    """Write the output of `fill` and its checksum to `target`, or leave `target` unchanged on failure."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with explain_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explain_full_disk(target), open(partial, "w+b") as file:
            hashed = _HashedFile(file)
            fill(hashed)
            hashed.seal()
            file.flush()
            os.fsync(file.fileno())
            put_in_place(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@functools.cache
def archive_damage(path: str, size: int, modified: int) -> str | None:
    """Describe the damage of the archive at `path`; None if it matches its checksum.

    Reads it all, once per process as long as its `size` (bytes) and the time it was `modified` (ns) stay the same.
    """
    with open(path, "rb") as file:
        file.seek(max(0, size - _END_SIZE - _COMMENT_SIZE))
        tail = file.read()
        if tail[-_END_SIZE:].startswith(_END) and tail.endswith(b"\0\0"):
            print(f"{path} has no checksum, and is not verified: an earlier version wrote it", file=sys.stderr)
            return None
        length, mark = _COMMENT_SIZE.to_bytes(2, "little"), tail[-_COMMENT_SIZE:]
        if not tail.startswith(_END) or not tail[:_END_SIZE].endswith(length) or not mark.startswith(_MARK):
            return "it is truncated, or not a checkpoint"
        sha256, left = hashlib.sha256(), size - _COMMENT_SIZE - 2
        block = memoryview(bytearray(_BLOCK))
        file.seek(0)
        while left > 0 and (count := file.readinto(block[:left])):
            sha256.update(block[:count])
            left -= count
    sha256.update(b"\0\0")
    found, written = sha256.hexdigest(), mark.removeprefix(_MARK).decode(errors="replace")
    return (
        None if found == written else f"it has changed since it was written: SHA-256 {found[:8]}..., was {written[:8]}"
    )


def archive_digest(path: str | os.PathLike[str]) -> str | None:
    """Return the SHA-256 stored in the archive, not compared with its content; None if it has none."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - _COMMENT_SIZE))
        comment = file.read()
    return comment.removeprefix(_MARK).decode() if comment.startswith(_MARK) else None


def read_archive(path: str | os.PathLike[str]) -> Any:
    """Return the content of the file, on the CPU, memory-mapped.

    Raises:
        ValueError: if it cannot be read, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0][:200]  # the first sentence of torch's message
        raise ValueError(
            f"{path} cannot be read as a checkpoint (damaged, or another kind of file): {reason}"
        ) from error


def put_in_place(partial: Path, target: Path) -> None:
    """Rename what has been written, file or folder, to its target; replace any earlier file or folder there.

    If either is a folder, the earlier one is renamed first: a kill between the two renames leaves both hidden, and the
    next search for a checkpoint finds the one before.
    """
    if not target.is_dir() and not (partial.is_dir() and target.exists()):
        os.replace(partial, target)
        return
    aside = _hidden(target)
    os.replace(target, aside)
    try:
        os.replace(partial, target)
    except BaseException:
        os.replace(aside, target)
        raise
    _delete(aside)


def remove(path: Path) -> None:
    """Remove a checkpoint, file or folder; a kill leaves no partial folder that looks complete."""
    if path.is_dir():
        aside = _hidden(path)
        os.replace(path, aside)
        path = aside
    _delete(path)


def clear_hidden(folder: Path) -> None:
    """Remove the files in `folder` that were being written, replaced or removed when their process was killed."""
    for partial in folder.glob(".*.partial"):
        _delete(partial)


def _hidden(path: Path) -> Path:
    """Return a name that only `clear_hidden` finds."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _delete(path: Path) -> None:
    if path.is_dir():
        # A network file system keeps files, and so the folder, as long as they are mapped into memory. They stay hidden,
        # and are removed when the next fit begins.
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_full_disk(target: Path) -> Iterator[None]:
    """Convert errors caused by a full disk to one that states the free space and what to do."""
    try:
        yield
    except Exception as error:
        folder = next(path for path in (target.parent, *target.parents) if path.exists())
        if not _disk_full(error, folder):
            raise
        status = os.statvfs(folder)
        free = f"{status.f_bavail * status.f_frsize / 1e6:,.0f} MB free"
        if status.f_files and not status.f_favail:
            free = "no inodes are left: there are too many files"
        raise OSError(
            errno.ENOSPC,
            f"no space to write the checkpoint ({free}); earlier checkpoints are intact. Free"
            " some space, then run `bigmodel fit --resume`",
            str(target),
        ) from error


def _disk_full(error: Exception, folder: Path) -> bool:
    """True if the disk is full; torch and safetensors report no errno, so the message and the disk are checked as well."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or (
        isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20
    )
