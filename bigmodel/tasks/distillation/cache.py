"""What a teacher says of each sample, kept: all logits, or its likeliest classes with their probabilities.

Kept by what it is a function of: the teacher's weights, the data, what the samples look like when they are augmented, and
for probabilities the temperature. See `bigmodel.data.output_cache` for the files.

B samples, n positions, K classes, k of them kept, T temperature.
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
from bigmodel.data.output_cache import FieldSpec, OutputCache
from bigmodel.tasks.distillation import losses

REMEDY = (
    "set --model.cache.folder or $BIGMODEL_CACHE to a place on a larger one, or keep fewer classes"
    " (--model.cache.top_k) or --data.views"
)
_DIFFERING = {  # entries of a key, in words
    "teacher": "another teacher",
    "data": "other data",
    "augmentation": "samples that look otherwise (augmentation, size)",
}
_MOST_INT16 = 1 << 16  # numbers that 16 bits tell apart


@dataclass(frozen=True)
class TeacherCache:
    """Keep what the teacher says on the disk: computed before the first step; later runs do not even load the teacher.

    It is computed in batches of one process's micro-batch, which is known to fit the memory: made with another micro-batch,
    what is kept may differ in the last bits, as sums do. The number of processes changes nothing.

    Args:
        top_k: keep so many of the likeliest classes of each position, with their probabilities and that of the rest at the
            temperature of the losses, which then must all have the same and no schedule; null: keep all logits.
        dtype: of logits or log-probabilities: float16 or float32.
        folder: for these teachers and data alone: one that holds what others said is refused. By default $BIGMODEL_CACHE or
            ~/.cache/bigmodel, where all lie side by side.
    """

    top_k: int | None = None
    dtype: Literal["float16", "float32"] = "float16"
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"--model.cache.top_k {self.top_k}: at least 1 class is needed; leave it out to keep all")

    @property
    def path(self) -> Path:
        """Where all teachers' stores are."""
        return cache_folder("distillation", self.folder)

    def key(
        self, teacher: str, fingerprint: str, shown: str, precision: str, temperature: float | None
    ) -> dict[str, Any]:
        """What a store is a function of.

        Args:
            teacher: `checkpoint.identity` of it.
            fingerprint: of the data.
            shown: `shown` of the first samples, in the first view and the last.
            precision: of the trainer.
            temperature: T, where probabilities are kept.
        """
        facts = {"teacher": teacher, "data": fingerprint, "augmentation": shown, "precision": precision}
        return {**facts, "dtype": self.dtype, "top_k": self.top_k, "temperature": temperature if self.top_k else None}

    def fields(self, shape: torch.Size) -> dict[str, FieldSpec]:
        """What is kept of a sample with logits of this shape [..., K]."""
        dtype = getattr(torch, self.dtype)
        if self.top_k is None:
            return {"logits": FieldSpec(tuple(shape), dtype)}
        kept, K = self._num_kept(shape[-1]), shape[-1]
        classes = FieldSpec((*shape[:-1], kept), torch.int16 if K <= _MOST_INT16 else torch.int32)
        return {"classes": classes, "log_probabilities": FieldSpec((*shape[:-1], kept + 1), dtype)}

    def _num_kept(self, num_classes: int) -> int:
        return min(self.top_k or num_classes, num_classes)

    def pack(self, logits: Tensor, temperature: float) -> dict[str, Tensor]:
        """What is kept of logits [B, ..., K]."""
        if self.top_k is None:
            return {"logits": logits}
        classes = logits.topk(self._num_kept(logits.shape[-1]), -1).indices
        kept = losses.partition(logits, classes, temperature)
        return {
            "classes": classes.to(torch.int16) if logits.shape[-1] <= _MOST_INT16 else classes,
            "log_probabilities": kept,
        }


def unpack(kept: Mapping[str, Tensor]) -> list[Tensor]:
    """What was kept of samples: logits [n, K], or classes [n, k] and log-probabilities [n, k + 1] of them and the rest."""
    if "logits" in kept:
        return [kept["logits"].flatten(0, -2)]
    classes = kept["classes"].flatten(0, -2).long()
    if kept["classes"].dtype == torch.int16:
        classes = classes & 0xFFFF  # its 16 bits without a sign
    return [classes, kept["log_probabilities"].flatten(0, -2)]


def log_probabilities(student: Tensor, rows: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Both models' log-probabilities, over all classes or over those that were kept and the rest.

    Args:
        student: logits [n, K].
        rows: as `unpack` gives them.
        temperature: T; where probabilities were kept, that at which they are.
    """
    if len(rows) == 1:
        return losses.log_probabilities(student, temperature), losses.log_probabilities(rows[0], temperature)
    classes, kept = rows
    # Rounded, they add up to almost 1.
    return losses.partition(student, classes, temperature), losses.log_probabilities(kept)


def shown(batches: list[Any], augmentation: str) -> str:
    """A digest of what batches show of their samples, and of how the data say that they are changed, which may be seldom."""
    sha256 = hashlib.sha256(augmentation.encode())
    for batch in batches:
        for name, values in zip(batch._fields, batch, strict=True):
            if isinstance(values, Tensor) and name not in ("weight", "key"):
                sha256.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
                sha256.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def find_store(cache: TeacherCache, key: Mapping[str, Any], num_samples: int, views: int) -> OutputCache | None:
    """The complete store of this key, if there is one."""
    return OutputCache.stored(cache.path, key, num_samples, views, "the teacher's logits")


def check_others(
    cache: TeacherCache, key: Mapping[str, Any], num_samples: int, views: int, own: set[Path]
) -> str | None:
    """See what is kept where a store of this key is not: in a folder that a person named it must be of this run.

    Args:
        own: the stores of this run's teachers.

    Returns:
        Where what is most like it lies, and what differs; None where nothing is of this teacher or of these data.

    Raises:
        ValueError: if it is of another teacher, of other data, or of anything else that the key says.
    """
    others = [other for other in OutputCache.others(cache.path, key, num_samples, views) if other.path not in own]
    if not others:
        return None
    path, differing = others[0].path, in_words(others[0].differences)
    if cache.folder is not None:
        raise ValueError(
            f"--model.cache.folder {cache.folder} holds what a teacher said under other conditions, {path}: {differing}."
            " Name another folder, delete that one, or leave out --model.cache.folder: in the default cache all lie side"
            " by side"
        )
    return None if {"teacher", "data"} <= others[0].differences.keys() else f"{path}: {differing}"


def in_words(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Entries in which keys differ: as they are wanted, as they are there."""
    return ", ".join(
        _DIFFERING.get(name, f"{name} {there}, not {wanted}") for name, (wanted, there) in differences.items()
    )


def new_store(
    cache: TeacherCache, key: Mapping[str, Any], num_samples: int, views: int, shape: torch.Size
) -> OutputCache:
    """A store to be computed, for logits of this shape [..., K] of a sample."""
    return OutputCache(cache.path, key, num_samples, cache.fields(shape), views, "the teacher's logits", REMEDY)
