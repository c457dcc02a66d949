"""Checkpoint of sharded tensors: a folder into which each process writes its own parts; reading it runs no code.

    last-<step>.ckpt/
        state.ckpt                       the checkpoint with None in place of each DTensor (`archive`)
        shard-<rank>-of-<n>.safetensors  the parts of DTensors that one process holds, by name
        manifest.json                    the contents of the folder:
            sha256     of the text that follows it
            files      name: size in bytes, SHA-256
            processes  n
            tensors    name: paths (keys from the checkpoint's root; several for tied weights), shape, dtype, and parts:
                       [rank of its file, offsets, sizes]

All files are written into a hidden folder, which is renamed when every process has written: a kill at any moment leaves
the earlier checkpoints intact. Processes do not communicate in the meantime: process 0 detects from the files that the
other ones are done, so a thread can write while training continues. (torch.distributed.checkpoint has no checksums,
overwrites in place, and stores its metadata as a pickle.)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

from bigmodel.checkpoint.archive import explain_full_disk, put_in_place, write_archive
from bigmodel.checkpoint.manifest import STATE, file_facts, listing, shard_name, write_manifest, write_text
from bigmodel.checkpoint.parts import Keys, own_parts

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.tensor import DTensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of the person's umask; safetensors itself makes it private."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


_TIMEOUT = 600.0  # seconds without a write by any process before the first raises TimeoutError


class FolderWriter:
    """Writer of one process's share of a sharded checkpoint. All processes create one, and call it.

    Args:
        target: the folder, on a file system that all processes share.
        tensors: the DTensors, from `split`; the same on all processes, except for their local parts.
        fill: writes the rest into a file; used by the first process.
        copied: copy the parts, so that training may continue before it is called.

    Raises:
        ValueError: for a tensor that cannot be stored.
    """

    def __init__(self, target: Path, tensors: dict[Keys, DTensor], fill: Callable[[Any], object], copied: bool) -> None:
        self.target, self.fill = target, fill
        self.rank, self.num_processes = distributed.get_rank(), distributed.get_world_size()
        attempt = [secrets.token_hex(4)]  # keeps remains of an earlier attempt separate
        distributed.broadcast_object_list(attempt)
        self._partial = target.with_name(f".{target.name}.{attempt[0]}.partial")
        self._partial.mkdir(parents=True, exist_ok=True)
        with self._report_failure():
            self._records, self._parts = own_parts(tensors, copied)

    def __call__(self) -> None:
        """Write; process 0 returns when the whole checkpoint is in place, any other process when its own part is.

        Raises:
            OSError: if the disk is full, or a process fails or stops writing (TimeoutError).
        """
        with self._report_failure(), explain_full_disk(self.target):
            self._write_shard()
            if self.rank == 0:
                self._complete()

    @contextlib.contextmanager
    def _report_failure(self) -> Iterator[None]:
        """Report exceptions in this context to process 0, which waits for this one."""
        try:
            yield
        except BaseException as error:
            if self.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            elif self._partial.is_dir():
                with contextlib.suppress(OSError):  # the error itself is raised in any case
                    write_text(self._record_of(self.rank), json.dumps({"error": str(error)}))
            else:
                raise RuntimeError(f"{self.target} was not written: see the output of process 0") from error
            raise

    def _record_of(self, rank: int) -> Path:
        """Return the path of the file that a process writes last."""
        return self._partial / f"shard-{rank}.json"

    def _write_shard(self) -> None:
        path = self._partial / shard_name(self.rank, self.num_processes)
        save_tensors(self._parts, path)
        self._parts = {}
        record = {"file": file_facts(path), "tensors": self._records}
        write_text(self._record_of(self.rank), json.dumps(record))

    def _complete(self) -> None:
        write_archive(self._partial / STATE, self.fill)
        records = self._others()
        files = {shard_name(rank, self.num_processes): record["file"] for rank, record in enumerate(records)}
        content = {
            "files": {STATE: file_facts(self._partial / STATE), **files},
            "processes": self.num_processes,
            "tensors": _merged([record["tensors"] for record in records]),
        }
        write_manifest(self._partial, content)
        for rank in range(self.num_processes):
            self._record_of(rank).unlink()
        _sync_folder(self._partial)
        put_in_place(self._partial, self.target)
        _sync_folder(self.target.parent)

    def _others(self) -> list[dict[str, Any]]:
        """Wait until all processes have written, and return their records."""
        records: dict[int, dict[str, Any]] = {}
        seen: list[Any] = []
        pause, since = 0.001, time.monotonic()
        while True:
            for rank in set(range(self.num_processes)) - records.keys():
                path = self._record_of(rank)
                if path.exists():
                    records[rank] = json.loads(path.read_text())
                    if "error" in records[rank]:
                        raise OSError(f"process {rank} could not write {self.target}: {records[rank]['error']}")
            if len(records) == self.num_processes:
                return [records[rank] for rank in range(self.num_processes)]
            now = listing(self._partial)
            if now != seen:  # a process is writing
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > _TIMEOUT:
                missing = ", ".join(str(rank) for rank in range(self.num_processes) if rank not in records)
                raise TimeoutError(
                    f"{self.target} is not complete, and nothing was written for {_TIMEOUT:g} s: the parts of processes"
                    f" {missing} are missing. Check that they run, and that all processes share the file system of"
                    f" {self.target.parent}. Earlier checkpoints are intact"
                )
            time.sleep(pause)
            pause = min(0.2, 1.2 * pause)


def _merged(records: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Merge the records of all processes into the manifest's `tensors`.

    Raises:
        ValueError: if the parts of a tensor do not cover it.
    """
    by_keys: dict[Keys, dict[str, Any]] = {}
    for rank, own in enumerate(records):
        for record in own:
            tensor = by_keys.setdefault(tuple(record["keys"]), {**record, "parts": []})
            if "part" in record:
                tensor["name"] = record["name"]
                tensor["parts"].append([rank, *record["part"]])
    tensors: dict[str, Any] = {}
    for keys, tensor in by_keys.items():
        found = sum(math.prod(sizes) for _, _, sizes in tensor["parts"])
        if found != math.prod(tensor["shape"]):
            raise ValueError(
                f"{tensor['name']} differs between processes: together they hold {found:,} elements, and its shape"
                f" {tensor['shape']} has {math.prod(tensor['shape']):,}"
            )
        entry = {"paths": [], **{key: tensor[key] for key in ("shape", "dtype", "parts")}}
        tensors.setdefault(tensor["name"], entry)["paths"].append(keys)
    return tensors


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not supported by every file system
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
