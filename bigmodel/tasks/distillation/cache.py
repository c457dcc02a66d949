"""On-disk cache of teacher outputs for each sample: all logits, or the most likely classes with their probabilities.

The cache key consists of the teacher's weights, the data, the augmented samples, and for probabilities the temperature.
See `bigmodel.data.output_cache` for the files.

B samples, n positions, K classes, k of them cached, T temperature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bigmodel.data.cache import cache_folder
from bigmodel.data.output_cache import FieldSpec
from bigmodel.tasks.distillation import losses

NAME = "the teacher's logits"  # in messages of the output cache
REMEDY = (
    "set --model.cache.folder or $BIGMODEL_CACHE to a folder on a larger one, or a smaller --model.cache.top_k or"
    " --data.num_augmentation_epochs"
)
_DIFFERENCES = {  # descriptions of entries of a key that are digests
    "teacher": "different teacher",
    "data": "different data",
    "augmentation": "different samples (augmentation, size)",
}
_MOST_INT16 = 1 << 16  # number of values of 16 bits


@dataclass(frozen=True)
class TeacherCache:
    """Caches the teacher's outputs on disk, computed before the first step; later runs do not load the teacher.

    The outputs are computed in micro-batches of one process, which fit in memory. With another micro-batch size they may
    differ in the last bits, because sums do. The number of processes has no effect.

    Args:
        top_k: number of most likely classes of each position to cache, with their probabilities and that of the rest at
            the temperature of the losses, which then must all have the same one without a schedule; null: all logits.
        dtype: of logits or log-probabilities: float16 or float32.
        folder: only for these teachers and data: a folder with outputs of different ones is rejected. By default
            $BIGMODEL_CACHE or ~/.cache/bigmodel, which holds all caches.
    """

    top_k: int | None = None
    dtype: Literal["float16", "float32"] = "float16"
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--model.cache.top_k {self.top_k} must be at least 1, or null for all logits")

    @property
    def path(self) -> Path:
        """Folder of the stores of all teachers."""
        return cache_folder("distillation", self.folder)

    def key(
        self, teacher: str, fingerprint: str, samples: str, precision: str, temperature: float | None
    ) -> dict[str, Any]:
        """Return the key of a store.

        Args:
            teacher: its `checkpoint.identity`.
            fingerprint: of the data.
            samples: digest (`samples_digest`) of the first samples, in the first view and the last.
            precision: of the trainer.
            temperature: T, where probabilities are cached.
        """
        entries = {"teacher": teacher, "data": fingerprint, "augmentation": samples, "precision": precision}
        return {**entries, "dtype": self.dtype, "top_k": self.top_k, "temperature": temperature if self.top_k else None}

    def fields(self, shape: torch.Size) -> dict[str, FieldSpec]:
        """Return the fields that are cached for a sample with logits of this shape [..., K]."""
        dtype = getattr(torch, self.dtype)
        if self.top_k is None:
            return {"logits": FieldSpec(tuple(shape), dtype)}
        k, K = self._num_cached(shape[-1]), shape[-1]
        classes = FieldSpec((*shape[:-1], k), torch.int16 if K <= _MOST_INT16 else torch.int32)
        return {"classes": classes, "log_probabilities": FieldSpec((*shape[:-1], k + 1), dtype)}

    def _num_cached(self, num_classes: int) -> int:
        return min(self.top_k or num_classes, num_classes)

    def pack(self, logits: Tensor, temperature: float) -> dict[str, Tensor]:
        """Convert logits [B, ..., K] to the cached fields."""
        if self.top_k is None:
            return {"logits": logits}
        classes = logits.topk(self._num_cached(logits.shape[-1]), -1).indices
        return {
            "classes": classes.to(torch.int16) if logits.shape[-1] <= _MOST_INT16 else classes,
            "log_probabilities": losses.partition(logits, classes, temperature),
        }


def unpack(fields: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the cached outputs of samples: logits [n, K], or classes [n, k] and log-probabilities [n, k + 1] of them
    and the rest.
    """
    if "logits" in fields:
        return [fields["logits"].flatten(0, -2)]
    classes = fields["classes"].flatten(0, -2).long()
    if fields["classes"].dtype == torch.int16:
        classes = classes & 0xFFFF  # the 16 bits as unsigned
    return [classes, fields["log_probabilities"].flatten(0, -2)]


def log_probabilities(student: Tensor, rows: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of both models, over all classes or over the cached ones and the rest.

    Args:
        student: logits [n, K].
        rows: as `unpack` returns them.
        temperature: T; where probabilities are cached, the one they were computed at.
    """
    if len(rows) == 1:
        return losses.log_probabilities(student, temperature), losses.log_probabilities(rows[0], temperature)
    classes, cached = rows
    # Rounded probabilities do not sum exactly to 1.
    return losses.partition(student, classes, temperature), losses.log_probabilities(cached)


def samples_digest(batches: list[Any], augmentation: str) -> str:
    """Return a digest of the samples in batches, and of the augmentation settings, whose effect may be rare."""
    sha256 = hashlib.sha256(augmentation.encode())
    for batch in batches:
        for name, values in zip(batch._fields, batch, strict=True):
            if isinstance(values, Tensor) and name not in ("weight", "key"):
                sha256.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
                sha256.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def format_differences(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Describe the entries in which keys differ: requested and existing."""
    return ", ".join(
        _DIFFERENCES.get(name, f"{name} {found}, not {wanted}") for name, (wanted, found) in differences.items()
    )
