"""Checkpoint files: written atomically, each with its checksum inside, and read as data only.

A file is the zip archive that `torch.save` writes, and the archive's comment is its SHA-256:

    the archive, up to the two bytes that give the comment's length | 71 | sha256:<64 hexadecimal digits>

The digest is that of the archive as torch wrote it, where the length is 0. So one rename puts file and checksum in place,
neither is ever without the other, however the file is copied, and torch, zipfile and unzip read it like any archive.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import distributed

_END = b"PK\x05\x06"  # opens the last record of a zip archive, 22 bytes of which the last two are the comment's length
_END_SIZE = 22
_MARK = b"sha256:"
_COMMENT_SIZE = len(_MARK) + 64
_BLOCK = 1 << 20  # bytes


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: a crash or a full disk leaves the earlier checkpoint as it was.

    Each file carries its checksum, and is verified before it is loaded, by the first process for all. Loading is
    `weights_only`: a checkpoint holds tensors and plain values, and reading one runs no code.

    Args:
        asynchronous: a save copies the checkpoint into memory, and a thread writes the file while training goes on. The next
            save, a load, and the end of the run, by an exception too, wait for the thread and raise what it has raised.
            `Checkpoint` sets this for its own saves.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []  # a write, and the removals that wait for it

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        if not self.asynchronous:
            _write(Path(path), lambda file: torch.save(checkpoint, file))
            return
        content = io.BytesIO()  # the bytes of the file: nothing that training changes is looked at later
        torch.save(checkpoint, content)
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._pending.append(self._thread.submit(_write, Path(path), lambda file: file.write(content.getbuffer())))

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a file, but not before the one that is being written is in place, and not at all if that has failed."""
        if not self._pending:
            super().remove_checkpoint(path)
            return
        assert self._thread is not None
        self._pending.append(self._thread.submit(self._remove_after, self._pending[0], path))

    def _remove_after(self, written: Future[None], path: Any) -> None:
        written.result()
        super().remove_checkpoint(path)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        self.wait()
        together = distributed.is_available() and distributed.is_initialized()
        verdict: list[str | None] = [str(path), None]
        if not together or distributed.get_rank() == 0:
            verdict[1] = _problem(path)
        if together:
            distributed.broadcast_object_list(verdict)
        if verdict[1]:
            raise ValueError(verdict[1])
        return read(str(verdict[0]), verify=False)

    def wait(self) -> None:
        """Wait until all is written, and raise what went wrong."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def teardown(self) -> None:
        """What Lightning calls at the end of a run, however it came."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


class _HashedFile:
    """A file that is open for writing and reading, hashed as it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> None:
        """Write the digest as the comment of the archive, which is complete."""
        comment = _MARK + self._sha256.hexdigest().encode()
        self._file.seek(-_END_SIZE, os.SEEK_END)
        end = self._file.read(_END_SIZE)
        assert end.startswith(_END), end
        assert end.endswith(b"\0\0"), end
        self._file.seek(-2, os.SEEK_END)
        self._file.write(len(comment).to_bytes(2, "little") + comment)


def _write(target: Path, fill: Callable[[Any], object]) -> None:
    """Write what `fill` writes, and its checksum, in place of `target` or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w+b") as file:
            hashed = _HashedFile(file)
            fill(hashed)
            hashed.seal()
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if _disk_full(error, target.parent):
            free = shutil.disk_usage(target.parent).free
            raise OSError(
                errno.ENOSPC,
                f"no space to write the checkpoint ({free / 1e6:,.0f} MB free); earlier checkpoints are intact. Free"
                " some space and go on with `bigmodel fit --resume`",
                str(target),
            ) from error
        raise


def _disk_full(error: BaseException, folder: Path) -> bool:
    """torch reports a failed write as a RuntimeError without the cause, so look at the disk as well."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20


def damage(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a checkpoint file, by its checksum; None if it is as it was written.

    Reads the whole file, once in a process as long as it is not changed. A file without a checksum, of an earlier version,
    is let pass, which is said in a line.
    """
    try:
        facts = os.stat(path)
        return _damage(os.fspath(path), facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        return f"reading it fails: {error.strerror}"


@functools.cache
def _damage(path: str, size: int, modified: int) -> str | None:
    with open(path, "rb") as file:
        file.seek(max(0, size - _END_SIZE - _COMMENT_SIZE))
        tail = file.read()
        if tail[-_END_SIZE:].startswith(_END) and tail.endswith(b"\0\0"):
            print(f"{path} has no checksum to verify it by: an earlier version wrote it", file=sys.stderr)
            return None
        length, mark = _COMMENT_SIZE.to_bytes(2, "little"), tail[-_COMMENT_SIZE:]
        if not tail.startswith(_END) or not tail[:_END_SIZE].endswith(length) or not mark.startswith(_MARK):
            return "it does not end as a checkpoint does: it was cut off, or never was one"
        sha256, left = hashlib.sha256(), size - _COMMENT_SIZE - 2
        block = memoryview(bytearray(_BLOCK))
        file.seek(0)
        while left > 0 and (count := file.readinto(block[:left])):
            sha256.update(block[:count])
            left -= count
    sha256.update(b"\0\0")
    found, written = sha256.hexdigest(), mark.removeprefix(_MARK).decode(errors="replace")
    return None if found == written else f"it is not as it was written: SHA-256 {found[:8]}..., not {written[:8]}..."


def _problem(path: str | os.PathLike[str]) -> str | None:
    """Why a file cannot be used, in a sentence that names it; None if it can."""
    if not Path(path).is_file():
        return f"no checkpoint at {path}"
    found = damage(path)
    return f"{path} cannot be read as a checkpoint: {found}" if found else None


def read(path: str | os.PathLike[str], verify: bool = True) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU, memory-mapped.

    Args:
        path: the file.
        verify: refuse a file that is not as it was written; False where it has been verified.

    Raises:
        ValueError: if it is missing, damaged, or holds more than tensors and plain values.
    """
    problem = _problem(path) if verify else None
    if problem:
        raise ValueError(problem)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, or not one): {reason}") from error
    return checkpoint
