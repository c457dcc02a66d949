"""Predictions of any task, streamed into one file in the order of the samples, on any number of processes.

Each process appends its batches to a part of its own (an Arrow stream) in the folder of the file; at the end the first
process puts batch b of process r into place b W + r, as `bigmodel.data.sampling.eval_loader` distributed them, and
renames the file. Memory use does not grow with the number of samples, and a file with its final name is complete.

N samples, n of them in a batch, W processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from bigmodel.data.sampling import Loader
from bigmodel.data.text import print_text
from bigmodel.evaluation.prediction_files import open_table

_ROWS_AT_ONCE = 4096  # in a row group
_ROWS_SHOWN = 5


class PredictionWriter(Callback):
    """Writes the columns returned by the task's `predict_step` for each batch, without padding rows.

    `predict_step` returns a dict of columns. A column is a list of str (or None), a tensor [n] of numbers, a tensor [n,
    K], which becomes a list of K numbers in each row, or for any other type a pyarrow Array. A task may have a method
    `prediction_metadata() -> dict[str, str]`, which returns the metadata of the file, such as the names of the classes.

    Args:
        path: the file, which must not exist; its suffix selects the format, see `prediction_files.open_table`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part: Path | None = None
        self._stream: Any = None
        self._num_rows: int | None = None  # set when all is written

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.path.exists():
            raise ValueError(f"--output {self.path} exists: set --output to a new file")
        data: Any = getattr(trainer, "datamodule", None) or pl_module
        make = data.predict_dataloader
        data.predict_dataloader = lambda: _Batches(make(), trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = getattr(trainer, "datamodule", None) or pl_module
        data.__dict__.pop("predict_dataloader", None)
        if self._num_rows is not None:  # only now, after the progress bar has been removed
            print_text(f"wrote {self._num_rows:,} predictions to {self.path}")
            print_text(self._head, flush=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        self._made_folder = not self.path.parent.exists()
        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part = self._part_of(trainer.global_rank)

    def _part_of(self, process: int) -> Path:
        return self.path.with_name(f".{self.path.name}.{process}.part")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = record_batch(outputs)
        if self._stream is None:
            with _disk_errors(self.path):
                self._stream = pa.ipc.new_stream(str(self._part), rows.schema)
            self._schema = rows.schema
        if rows.schema != self._schema:
            raise ValueError(
                f"predict_step returned different columns for batch {batch_idx} than before: {_columns(rows.schema)}, not"
                f" {_columns(self._schema)}"
            )
        with _disk_errors(self.path):
            self._stream.write_batch(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        describe = getattr(pl_module, "prediction_metadata", dict)
        parts = [self._part_of(process) for process in range(trainer.world_size)]
        self._head = _head(parts)
        with _disk_errors(self.path):
            self._num_rows = merge(parts, self.path, describe())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(OSError):  # of a full disk, which has been reported
            self._close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            if self._made_folder:
                with contextlib.suppress(OSError):  # another process's part is in it
                    self.path.parent.rmdir()

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def check_prediction(task: LightningModule, data: Any) -> None:
    """Check that task and data support prediction.

    Raises:
        ValueError: if the task or its data module lacks a required method.
    """
    if not is_overridden("predict_step", task):
        raise ValueError(
            f"{type(task).__name__} cannot predict: it needs a method `predict_step(batch)` that returns a dict of columns"
        )
    if not is_overridden("predict_dataloader", data):
        raise ValueError(
            f"{type(data).__name__} cannot predict: it needs a method `predict_dataloader()` that returns a loader of"
            " bigmodel.data.sampling.eval_loader"
        )


class _Batches:
    """Iterable over a loader's batches that is not a DataLoader, which Lightning would re-create with its own samplers."""

    def __init__(self, loader: DataLoader[Any], trainer: Trainer) -> None:
        self.loader = loader
        share = trainer.distributed_sampler_kwargs
        if trainer.world_size > 1 and not isinstance(loader, Loader):
            raise ValueError(
                f"{trainer.world_size} processes would all predict the same samples from this {type(loader).__name__}:"
                " create it by bigmodel.data.sampling.eval_loader, or set --trainer.devices 1"
            )
        if share is not None and share["num_replicas"] != trainer.world_size:
            raise ValueError(
                f"some of the {trainer.world_size} processes share a model and its samples, but predictions need different"
                " samples in each process: set --trainer.strategy ddp or --trainer.devices 1"
            )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}; set --output to a different place") from error


def record_batch(columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Convert the columns returned by a `predict_step` to Arrow.

    Raises:
        ValueError: if they are not columns of the kinds above, or not of the same length.
    """
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(f"predict_step must return a dict of columns, not {type(columns).__name__}")
    arrays = {name: _array(name, column) for name, column in columns.items()}
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise ValueError(f"predict_step returned columns of different numbers of rows: {lengths}")
    return pa.RecordBatch.from_pydict(arrays)


def _array(name: str, column: Any) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    if isinstance(column, list) and all(value is None or isinstance(value, str) for value in column):
        return pa.array(column, pa.string())
    if not isinstance(column, Tensor) or column.ndim not in (1, 2):
        what = f"a tensor {tuple(column.shape)}" if isinstance(column, Tensor) else f"a {type(column).__name__}"
        raise ValueError(
            f"predict_step returned {what} as column {name!r}; a list of str, a tensor [n] or [n, K], or a pyarrow Array is"
            " needed"
        )
    column = column.detach().cpu()
    if column.dtype in (torch.bfloat16, torch.float16):
        column = column.float()
    flat = pa.array(column.reshape(-1).numpy())  # [n] or [n K]
    return flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def merge(parts: Sequence[Path], path: Path, metadata: Mapping[str, str]) -> int:
    """Write the batches of all parts into one file, and remove the parts.

    The order is the first batch of each part, then the second of each, and so on.

    Args:
        parts: Arrow streams, by process.
        path: the file, which exists only when it is complete; its suffix selects the format, see `open_table`.
        metadata: of the file, if it is Parquet.

    Returns:
        N, the number of rows.

    Raises:
        ValueError: if a part is missing.
    """
    missing = [part for part in parts if not part.exists()]
    if missing:
        raise ValueError(f"{missing[0]} is missing: set --output to a file on a disk that all processes share")
    partial = path.with_name(f".{path.name}.partial")
    num_rows = 0
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(pa.memory_map(str(part))) for part in parts]
            streams = [stack.enter_context(pa.ipc.open_stream(file)) for file in files]
            schema = streams[0].schema
            writer = stack.enter_context(contextlib.closing(open_table(partial, path.name, schema, metadata)))
            ordered = (batch for batches in zip_longest(*streams) for batch in batches if batch is not None)
            for table in _row_groups(ordered):
                writer.write(table)
                num_rows += len(table)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        for part in parts:
            part.unlink(missing_ok=True)
    return num_rows


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Yield the batches combined to tables of several thousand rows."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _ROWS_AT_ONCE:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _head(parts: Sequence[Path]) -> str:
    """Format the first rows of the first part, which are the first samples, as a table."""
    if not parts[0].exists():  # refused by `merge`
        return ""
    with pa.memory_map(str(parts[0])) as file, pa.ipc.open_stream(file) as stream:
        first = next(iter(stream), None)
        rows = [stream.schema.names]
        rows += [
            [_shown(value) for value in row.values()] for row in (first[:_ROWS_SHOWN].to_pylist() if first else [])
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value[:3]))}{', …' if len(value) > 3 else ''}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= 40 else "…" + text[-39:]
