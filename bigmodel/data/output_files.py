"""Files of an output store (`bigmodel.data.output_cache`): memory-mapped rows, and a mask of computed rows.

R rows.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MARK_SECONDS = 10.0  # interval at which rows are flushed to the disk and marked as done


@dataclass(frozen=True)
class FieldSpec:
    """One kind of output.

    Args:
        shape: of a row.
        dtype: of the stored values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Writer:
    """Memory-mapped files of a store that is being computed."""

    def __init__(self, folder: Path, fields: Mapping[str, FieldSpec], num_rows: int) -> None:
        self._maps = {
            name: map_rows(folder / f"{name}.bin", field, num_rows, mmap.ACCESS_WRITE) for name, field in fields.items()
        }
        self._done_map, self.done = map_rows(
            folder / "done.bin", FieldSpec((), torch.uint8), num_rows, mmap.ACCESS_WRITE
        )
        self._unmarked: list[Tensor] = []
        self._marked = time.monotonic()

    def have(self, rows: Tensor) -> bool:
        """True if all these rows are computed."""
        return bool(self.done[rows].all())

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        for name, (_, stored) in self._maps.items():
            stored[rows] = values[name]
        self._unmarked.append(rows)
        if time.monotonic() - self._marked > MARK_SECONDS:
            self.mark()

    def mark(self) -> None:
        """Flush the written rows to the disk, then mark them as done: a marked row exists after any crash."""
        for mapping, _ in self._maps.values():
            mapping.flush()
        for rows in self._unmarked:
            self.done[rows] = 1
        self._done_map.flush()
        self._unmarked, self._marked = [], time.monotonic()

    def close(self) -> None:
        """Mark the written rows: an interrupted computation continues from here."""
        self.mark()


def map_rows(file: Path, field: FieldSpec, num_rows: int, access: int) -> tuple[mmap.mmap, Tensor]:
    """Return a file's mapping, and the rows [R, *shape] in it."""
    with open(file, "r+b" if access == mmap.ACCESS_WRITE else "rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=access)
    return mapping, torch.frombuffer(mapping, dtype=field.dtype).view(num_rows, *field.shape)
