"""Memory-mapped on-disk cache of a frozen model's output for every sample.

The name of a store is a digest of everything that its content depends on; a folder with that name is complete::

    <folder>/<digest>/            computed; also checksums.json, see `bigmodel.data.checksums`
        key.json                  the values that the content depends on
        <field>.bin               a row of numbers per sample and nothing else; row v N + i is sample i in view v
    <folder>/.<digest>.<host>/    being computed; an interrupted computation continues from the existing rows
        done.bin                  a byte per row: 1 if it is computed

Each node computes all rows and its processes share them, so the disk may be shared by nodes or local. All processes
on a machine that compute the same store at once, also those of other runs, write the same numbers to the same files.

N samples, V views of each (as many epochs of augmentation: `num_augmentation_epochs` of `train_loader`), B rows of a batch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from bigmodel.data.cache import digest, progress, publish, write_text
from bigmodel.data.checksums import compare_checksums, write_checksums
from bigmodel.data.output_files import FieldSpec, Writer, map_rows

VERSION = 1  # of this format
RELEASE_READS = 1024  # reads after which mapped pages are released; else resident memory grows to the size of the files


@dataclass(frozen=True)
class CacheMismatch:
    """Store with a different key.

    Args:
        path: its path.
        differences: the entries in which the keys differ, by name: the requested value, and the stored one.
    """

    path: Path
    differences: dict[str, tuple[Any, Any]]


class OutputCache:
    """Store of outputs, possibly not computed yet; opened on the first read.

    Args:
        folder: the folder of such stores.
        key: everything that the outputs depend on, plain values by name: net, data, augmentation.
        num_samples: N.
        fields: the kinds of output, by name.
        views: V.
        what: the name of the outputs, for messages.
        remedy: advice for messages if the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        num_samples: int,
        fields: Mapping[str, FieldSpec],
        views: int = 1,
        what: str = "outputs",
        remedy: str = "set $BIGMODEL_CACHE to a folder on a larger one",
    ) -> None:
        self.folder, self.num_samples, self.views, self.fields = folder, num_samples, views, dict(fields)
        self.what, self.remedy = what, remedy
        kinds = {name: [list(field.shape), str(field.dtype)] for name, field in fields.items()}
        facts = {"version": VERSION, "samples": num_samples, "views": views, "fields": kinds}
        self.key: dict[str, Any] = json.loads(json.dumps({**key, **facts}, sort_keys=True))
        self.path = folder / digest(self.key)
        self._maps: dict[str, tuple[mmap.mmap, Tensor]] = {}
        self._pinned = torch.cuda.is_available()  # queried once, because it is slow
        self._reads = 0

    @classmethod
    def stored(
        cls, folder: Path, key: Mapping[str, Any], num_samples: int, views: int = 1, what: str = "outputs"
    ) -> OutputCache | None:
        """Return the complete store of this key, with its fields; None if there is none.

        For callers that would need the net to determine the fields; a complete store makes the net unnecessary.

        Raises:
            ValueError: if it is damaged.
        """
        for file, other in _read_keys(folder):
            fields = _fields(other)
            if fields is None:
                continue
            found = cls(folder, key, num_samples, fields, views, what)
            if found.path == file.parent:
                compare_checksums(found.path)
                return found
        return None

    @property
    def num_rows(self) -> int:
        """Number of rows: V N."""
        return self.views * self.num_samples

    @property
    def num_bytes(self) -> int:
        """Size on the disk of the complete store."""
        return self.num_rows * sum(field.row_bytes for field in self.fields.values())

    @property
    def complete(self) -> bool:
        """True if all rows are computed."""
        return self.path.is_dir()

    @staticmethod
    def others(folder: Path, key: Mapping[str, Any], num_samples: int, views: int = 1) -> list[CacheMismatch]:
        """Return the complete stores of other keys in the folder, the most similar first. Fields are not compared."""
        wanted = json.loads(json.dumps({**key, "version": VERSION, "samples": num_samples, "views": views}))
        found = []
        for file, other in _read_keys(folder):
            names = [name for name in {**wanted, **other} if wanted.get(name) != other.get(name) and name != "fields"]
            if names:
                found.append(CacheMismatch(file.parent, {name: (wanted.get(name), other.get(name)) for name in names}))
        return sorted(found, key=lambda other: len(other.differences))

    def compute(
        self,
        trainer: Trainer | None,
        batches: Callable[[int], Iterable[Any]],
        compute: Callable[[Any], Mapping[str, Tensor]],
    ) -> None:
        """Compute missing rows. All processes call this; afterwards each node has a complete store.

        Args:
            trainer: provides the processes; None: only this one.
            batches: called with each view, returns batches that together contain each sample once, as
                `sampling.sequential_loader` creates them; rows of weight 0 are left out.
            compute: returns a batch's outputs [B, *shape] by name, without gradients, on any device. The net is not
                sharded, and in evaluation mode.

        Raises:
            ValueError: if the disk is too small, outputs do not have the declared shape, are not finite, or are too
                large for their type; if a sample occurs twice or never; if the existing store is damaged.
        """
        strategy = trainer.strategy if trainer is not None else None
        if self.complete if strategy is None else strategy.reduce_boolean_decision(self.complete):
            compare_checksums(self.path)
            return

        def wait_for_all() -> None:
            if strategy is not None:
                strategy.barrier()

        first, share = (trainer.local_rank == 0, trainer.num_devices) if trainer is not None else (True, 1)
        self.check_space()
        wait_for_all()
        if first and not self.complete:
            with self._disk_errors():
                self._allocate()
        wait_for_all()
        with contextlib.ExitStack() as stack:
            writer = self._open_writer()
            if writer is not None:
                stack.callback(writer.close)
                advance = stack.enter_context(progress(self.what, self.num_rows, "rows")) if first else None
                for view in range(self.views):
                    seen = torch.zeros(self.num_samples, dtype=torch.bool)
                    for batch in batches(view):
                        num_rows = self._write(writer, batch, view, seen, compute)
                        if advance is not None:
                            advance(num_rows * share)
                writer.mark()
            wait_for_all()
            if writer is not None:
                self._check_whole(writer)
        if first:
            self._publish()
        wait_for_all()

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{socket.gethostname()}")

    @property
    def num_missing_bytes(self) -> int:
        """Bytes still to be allocated on the disk."""
        there = sum(file.stat().st_blocks * 512 for file in self._partial.glob("*.bin"))
        return 0 if self.complete else self.num_bytes + self.num_rows - there

    def check_space(self, beside: int = 0) -> None:
        """Check the space for the bytes still to be allocated; `compute` does so too.

        Args:
            beside: further bytes that will be used there.

        Raises:
            ValueError: if the disk is too small, or not writable.
        """
        if self.complete:
            return
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "no permission to write")
        needed, free = self.num_missing_bytes + beside, shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"{self.what} of {self.num_samples:,} samples{f' in {self.views} views' if self.views > 1 else ''} take"
                f" {needed / 1e6:,.1f} MB, and {self.folder} has {free / 1e6:,.1f} MB left: {self.remedy}"
            )

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Convert an error of the disk to one that states a remedy."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.what} cannot be stored in {self.folder} ({error.strerror}): {self.remedy}"
            ) from error

    def _allocate(self) -> None:
        """Create files of their final size, so that a full disk raises here, not as a signal when a page is written."""
        self._partial.mkdir(exist_ok=True)
        write_text(self._partial / "key.json", json.dumps(self.key, indent=2))
        sizes = {name: field.row_bytes * self.num_rows for name, field in self.fields.items()}
        for name, size in {**sizes, "done": self.num_rows}.items():
            file = os.open(self._partial / f"{name}.bin", os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # If the disk cannot allocate (NFS), zeros are written instead: never over existing data.
                if os.fstat(file).st_size < size:
                    os.posix_fallocate(file, 0, size)
            finally:
                os.close(file)

    def _open_writer(self) -> Writer | None:
        """Return a writer; None if the processes of another run have just finished the work."""
        try:
            return Writer(self._partial, self.fields, self.num_rows)
        except FileNotFoundError:
            if not self.complete:
                raise
            return None

    def _write(
        self,
        writer: Writer,
        batch: Any,
        view: int,
        seen: Tensor,
        compute: Callable[[Any], Mapping[str, Tensor]],
    ) -> int:
        """Write a batch's rows, unless they exist; return their number."""
        real = batch.weight > 0
        samples = batch.index[real]
        outside = (samples < 0) | (samples >= self.num_samples)
        if outside.any() or seen[samples].any() or len(samples.unique()) < len(samples):
            raise ValueError(
                f"{self.what}: a sample occurs twice, or has a number outside 0 to {self.num_samples - 1:,} (samples"
                f" {_some(samples)}): the cache needs data with each sample once in an epoch"
            )
        seen[samples] = True
        rows = view * self.num_samples + samples
        if len(rows) and not writer.have(rows):
            with torch.no_grad():
                values = compute(batch)
            writer.write(rows, {name: self._to_stored(name, values[name], real) for name in self.fields})
        return len(rows)

    def _to_stored(self, name: str, values: Tensor, real: Tensor) -> Tensor:
        """Return the real rows of a field, in its stored type."""
        field = self.fields[name]
        if values.shape != (len(real), *field.shape):
            raise ValueError(
                f"{self.what}: {name} of {len(real)} samples has shape {list(values.shape)}, not"
                f" {[len(real), *field.shape]}"
            )
        values = values.detach()[real.to(values.device)]
        stored = values.to(field.dtype).cpu()
        if field.dtype.is_floating_point:
            values = values.cpu()
            if (values.isnan() | values.isposinf()).any():  # -inf is the score of an excluded choice
                raise ValueError(
                    f"{self.what}: {name} of some sample is not finite (NaN or infinite): the net diverged, or"
                    " overflows at this --trainer.precision"
                )
            if (stored.isinf() & values.isfinite()).any():
                largest = float(values[values.isfinite()].abs().max())
                raise ValueError(
                    f"{self.what}: {name} reaches {largest:,.0f}, too large for {str(field.dtype).removeprefix('torch.')}:"
                    " store it as float32"
                )
        return stored

    def _check_whole(self, writer: Writer) -> None:
        missing = (writer.done == 0).nonzero().flatten()
        if len(missing):
            raise ValueError(
                f"{self.what}: {len(missing):,} of {self.num_rows:,} rows are missing (samples"
                f" {_some(missing % self.num_samples)}): the batches must contain each sample once"
            )

    def _publish(self) -> None:
        partial = self._partial
        with contextlib.suppress(FileNotFoundError):  # another run on this machine was first
            write_checksums(partial, without=("done.bin",))
            publish(partial, self.path)
        shutil.rmtree(partial, ignore_errors=True)  # still exists if another machine was first
        (self.path / "done.bin").unlink(missing_ok=True)

    def read(self, index: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Return the outputs [B, *shape] of samples [B] in a view, by field, on the CPU (pinned if there is a GPU).

        The cost is that of copying them. `index` must be on the CPU: call this before the batch is moved to a device
        (`on_before_batch_transfer`).

        Raises:
            ValueError: if the store is not complete, or is damaged.
        """
        if not self._maps:
            self._open()
        self._reads += 1
        if self._reads % RELEASE_READS == 0:
            for mapping, _ in self._maps.values():
                mapping.madvise(mmap.MADV_DONTNEED)
        rows = index + view * self.num_samples
        outputs = {}
        for name, (_, values) in self._maps.items():
            out = torch.empty(len(rows), *values.shape[1:], dtype=values.dtype, pin_memory=self._pinned)
            outputs[name] = torch.index_select(values, 0, rows, out=out)
        return outputs

    def _open(self) -> None:
        if not self.complete:
            raise ValueError(f"{self.what}: {self.path} is missing or incomplete: compute it first")
        for name, field in self.fields.items():
            file, expected = self.path / f"{name}.bin", field.row_bytes * self.num_rows
            size = file.stat().st_size if file.exists() else 0
            if size != expected:
                raise ValueError(
                    f"{file} is damaged: {size:,} bytes, not {expected:,}. Delete {self.path} and start again"
                )
        compare_checksums(self.path)
        for name, field in self.fields.items():
            file = self.path / f"{name}.bin"
            # A copy-on-write mapping, because torch does not accept read-only memory; it is never written to.
            self._maps[name] = map_rows(file, field, self.num_rows, mmap.ACCESS_COPY)


def _read_keys(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the readable keys of complete stores, with their files. A damaged store is refused when it is opened."""
    for file in sorted(folder.glob("[!.]*/key.json")):
        with contextlib.suppress(ValueError):
            key = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(key, dict):
                yield file, key


def _fields(key: dict[str, Any]) -> dict[str, FieldSpec] | None:
    """Return the fields in a key; None if the key is damaged."""
    try:
        return {
            name: FieldSpec(tuple(shape), getattr(torch, dtype.removeprefix("torch.")))
            for name, (shape, dtype) in key["fields"].items()
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _some(samples: Tensor) -> str:
    numbers = samples.tolist()
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 over the names, types, shapes and bytes of a module's parameters and buffers.

    It identifies a net of a given architecture.
    """
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()
