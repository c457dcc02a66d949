"""Checkpoints as a file (`archive`) or, for sharded tensors, a folder (`shards`): written, verified, read as data only."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import distributed

from bigmodel.checkpoint.archive import archive_damage, archive_digest, read_archive, remove, write_archive
from bigmodel.checkpoint.manifest import MANIFEST, file_digest, folder_damage
from bigmodel.checkpoint.parts import split
from bigmodel.checkpoint.renamed import current_callbacks
from bigmodel.checkpoint.sharded import gather_full, read_folder
from bigmodel.checkpoint.shards import FolderWriter


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name and renames: a crash or a full disk leaves the earlier checkpoint intact.

    A checkpoint that contains DTensors becomes a folder, and all processes must save it. Any other is a file, saved by
    the first process. Each contains its checksums, and is verified before it is loaded, by the first process for all.
    Loading uses `weights_only`: a checkpoint holds tensors and plain values, and reading one runs no code.

    Args:
        asynchronous: a save copies the checkpoint into memory, and a thread writes it while training continues. The
            next save, a load, and the end of the run (also by an exception) wait for the thread and raise its
            exceptions. `Checkpoint` sets this for its own saves.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []  # a write, and the removals that follow it

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        rest, tensors = split(checkpoint)
        fill: Callable[[Any], object] = functools.partial(torch.save, rest)
        if self.asynchronous and (not tensors or distributed.get_rank() == 0):
            content = io.BytesIO()  # the bytes of the file: later changes by training have no effect
            fill(content)
            fill = functools.partial(_copy, content)
        write: Callable[[], None]
        if tensors:
            write = FolderWriter(Path(path), tensors, fill, self.asynchronous)
        else:
            write = functools.partial(write_archive, Path(path), fill)
        if not self.asynchronous:
            write()
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._pending.append(self._thread.submit(write))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, after the pending write has finished, and not at all if that has failed."""
        if not self._pending:
            remove(Path(path))
            return
        assert self._thread is not None
        self._pending.append(self._thread.submit(self._remove_after, self._pending[0], path))

    def _remove_after(self, written: Future[None], path: Any) -> None:
        written.result()
        remove(Path(path))

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
        whole: bool = True,
    ) -> dict[str, Any]:
        """Return the checkpoint, see `read`; `map_location` and `weights_only` are not used."""
        self.wait()
        together = distributed.is_available() and distributed.is_initialized()
        verdict: list[str | None] = [str(path), None]
        if not together or distributed.get_rank() == 0:
            verdict[1] = _problem(path)
        if together:
            distributed.broadcast_object_list(verdict)
        if verdict[1]:
            raise ValueError(verdict[1])
        return read(str(verdict[0]), verify=False, whole=whole)

    def wait(self) -> None:
        """Wait for pending writes, and raise their exceptions."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def teardown(self) -> None:
        """Finish pending writes; Lightning calls this at the end of every run, also after an exception."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


def _copy(content: io.BytesIO, file: Any) -> None:
    file.write(content.getbuffer())


def size_on_disk(path: Path) -> int:
    """Return the size of a checkpoint, file or folder, in bytes."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def find_damage(path: str | os.PathLike[str]) -> str | None:
    """Describe the damage of a checkpoint, by its checksums; None if it matches them.

    Reads all of it, once per process as long as it does not change. A checkpoint without checksums (of an earlier
    version or written by Lightning) is accepted, and a line is printed.
    """
    try:
        if Path(path).is_dir():
            return folder_damage(Path(path))
        status = os.stat(path)
        return archive_damage(os.fspath(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        return f"reading it fails: {error.strerror}"


def content_hash(path: Path) -> str:
    """Return 64 hexadecimal digits that identify a checkpoint's content.

    They are its stored SHA-256, read without the rest of it. If it has none, the file is hashed.
    """
    if path.is_dir():
        return file_digest(path / MANIFEST)  # lists the digests of all files
    return archive_digest(path) or file_digest(path)


def _problem(path: str | os.PathLike[str]) -> str | None:
    """Describe, in a sentence with its path, why a checkpoint cannot be used; None if it can."""
    if not Path(path).exists():
        return f"no checkpoint at {path}"
    found = find_damage(path)
    return f"{path} cannot be read as a checkpoint: {found}" if found else None


def read(path: str | os.PathLike[str], verify: bool = True, whole: bool = True) -> dict[str, Any]:
    """Return the checkpoint at `path`, on the CPU, memory-mapped.

    Args:
        path: the file, or the folder of a sharded one.
        verify: raise an error if it does not match its checksums; False if it has been verified.
        whole: read sharded tensors completely; False: they are `LazyShardedTensor`, to be read in part
            (`distribute_like`).

    Raises:
        ValueError: if it is missing, damaged, or holds more than tensors and plain values.
    """
    problem = _problem(path) if verify else None
    if problem:
        raise ValueError(problem)
    checkpoint: dict[str, Any] = read_folder(Path(path)) if Path(path).is_dir() else read_archive(path)
    if "callbacks" in checkpoint:
        checkpoint["callbacks"] = current_callbacks(checkpoint["callbacks"])
    return gather_full(checkpoint) if whole and Path(path).is_dir() else checkpoint
