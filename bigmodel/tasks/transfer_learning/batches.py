"""Labelled texts as batches of tokens, and their dataset.

B texts, T tokens, K classes, N texts of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigmodel.data.class_balance import ClassBalancedOversampling
from bigmodel.data.stateless_rng import sample_keys
from bigmodel.tasks.transfer_learning.prepare import PreparedTexts
from bigmodel.tasks.transfer_learning.targets import UNKNOWN, MultiHotTargets
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder

_MULTIPLE = 8  # T is a multiple of this, for matrix units


class LabelledTextBatch(NamedTuple):
    """Texts with their targets.

    Attributes:
        tokens: [B, T] int64, padded on the right; T is the longest of these, rounded up to a multiple of 8.
        mask: [B, T] bool, True for tokens of the text.
        segments: [B, T] int64, token type id: the text of a pair, for models that use it; else 0.
        targets: class indices [B] int64 (-1 where there is no label); or 0 and 1, [B, K] float32; or numbers [B]
            float32.
        index: [B] int64, number of the text in its split.
        weight: [B] float32, of the text's class; 0 for padding rows.
        key: [B] int64, key of the random draws of a sample.
    """

    tokens: Tensor
    mask: Tensor
    segments: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    weight: Tensor
    key: Tensor


def padded(rows: Sequence[np.ndarray], encoder: TextEncoder, paired: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, mask and segments [B, T] of encoded texts, see `LabelledTextBatch`."""
    longest = max(map(len, rows))
    width = -(-longest // _MULTIPLE) * _MULTIPLE
    if encoder.max_length is not None:
        width = max(longest, min(width, encoder.max_length))  # there are no more positions
    tokens = np.full((len(rows), width), encoder.pad_id, np.int64)
    segments = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        if paired and encoder.special_tokens.has_segments:
            segments[i, : len(row)] = encoder.segments(row)
    mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    return torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(segments)


class Texts:
    """The texts of a split.

    Args:
        parts: prepared texts, each with the rows [n] to use; concatenated.

    Attributes:
        lengths: [N] int64, tokens of each, including special tokens.
        paired: True if each is a pair.
    """

    def __init__(self, parts: Sequence[tuple[PreparedTexts, np.ndarray]]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(rows) for _, rows in parts)])
        self.lengths: np.ndarray = np.concatenate([np.diff(some.tokens.offsets)[rows] for some, rows in parts])
        self.paired = parts[0][0].pairs is not None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> str:
        """Return one text; a pair as `a | b`."""
        pair = self.pair(i)
        return self.text(i) if pair is None else f"{self.text(i)} | {pair}"

    def text(self, i: int) -> str:
        """Return one text, of a pair the first."""
        prepared, row = self._find(i)
        return prepared.texts[row].tobytes().decode()

    def pair(self, i: int) -> str | None:
        """Return the second text of a pair."""
        prepared, row = self._find(i)
        return prepared.pairs[row].tobytes().decode() if prepared.pairs is not None else None

    def tokens(self, i: int) -> np.ndarray:
        """Return all tokens [T] int32, including special tokens."""
        prepared, row = self._find(i)
        return prepared.tokens[row]

    @property
    def contents(self) -> np.ndarray:
        """[N] int64, a hash of each text."""
        return np.concatenate([prepared.contents[rows] for prepared, rows in self._parts])

    def _find(self, i: int) -> tuple[PreparedTexts, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"text {i} is outside of 0 to {len(self) - 1:,}")
        part = 0 if i < self._starts[1] else 1 + int(np.searchsorted(self._starts[2:], i, "right"))
        prepared, rows = self._parts[part]
        return prepared, int(rows[i - self._starts[part]])


class TextDataset(Dataset[LabelledTextBatch]):
    """Dataset of the texts of a split; returns batches.

    Args:
        texts: the split.
        targets: `[rows]` returns those of the batch.
        encoder: of the backbone.
        max_length: T, texts are truncated to it; None: no truncation.
        seed: with the epoch and the sample, determines a sample's key.
        class_weights: [K] float32, the weight of a text by its class; None: 1.
        balanced: oversample each class to the size of the largest.
        by_length: order samples by length, for evaluation with little padding.
    """

    def __init__(
        self,
        texts: Texts,
        targets: np.ndarray | MultiHotTargets,
        encoder: TextEncoder,
        max_length: int | None,
        seed: int,
        class_weights: np.ndarray | None = None,
        balanced: bool = False,
        by_length: bool = False,
    ) -> None:
        self.texts, self.targets, self.encoder, self.max_length = texts, targets, encoder, max_length
        self.seed, self.class_weights = seed, class_weights
        self._order = np.argsort(texts.lengths, kind="stable") if by_length else None
        self.balanced: ClassBalancedOversampling | None = None
        if balanced:
            assert isinstance(targets, np.ndarray)
            self.balanced = ClassBalancedOversampling(targets)

    def __len__(self) -> int:
        return len(self.texts if self.balanced is None else self.balanced)

    def __getitem__(self, number: int) -> LabelledTextBatch:
        """Return one sample of the first epoch, without the batch dimension."""
        return LabelledTextBatch(*(field[0] for field in self.__getitems__([number])))

    def __getitems__(self, numbers: Sequence[int], epoch: int = 0) -> LabelledTextBatch:
        """Return the samples of these numbers in an epoch, as one batch."""
        samples = np.asarray(numbers, np.int64)
        rows = self._rows(samples, epoch)
        cut = [self.encoder.truncate(self.texts.tokens(row), self.max_length) for row in rows.tolist()]
        targets = self.targets[rows]
        weight = np.ones(len(rows), np.float32) if self.class_weights is None else self.class_weights[targets]
        return LabelledTextBatch(
            *padded(cut, self.encoder, self.texts.paired),
            torch.from_numpy(targets),
            torch.from_numpy(rows),
            torch.from_numpy(weight),
            torch.from_numpy(sample_keys(self.seed, epoch, samples)),
        )

    def lengths(self, numbers: np.ndarray, epoch: int) -> np.ndarray:
        """Return the numbers of tokens [B] of these samples [B] in an epoch."""
        lengths = self.texts.lengths[self._rows(numbers, epoch)]
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def _rows(self, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Return the text of each sample."""
        if self.balanced is not None:
            return self.balanced.rows(samples, epoch)
        return samples if self._order is None else self._order[samples]


def text_batch(
    encoder: TextEncoder, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = None
) -> LabelledTextBatch:
    """Make a batch of unlabelled texts for inference: no labels, weight 1.

    Args:
        encoder: of the task.
        texts: at least one.
        pairs: a second text for each.
        max_length: T, texts are truncated to it; None: the number of positions of the model.
    """
    limit = encoder.max_length if max_length is None else max_length
    cut = [encoder.truncate(row, limit) for row in encoder.encode(texts, pairs)]
    tokens, mask, segments = padded(cut, encoder, pairs is not None)
    index = torch.arange(len(texts))
    return LabelledTextBatch(
        tokens, mask, segments, torch.full_like(index, UNKNOWN), index, torch.ones(len(texts)), index.clone()
    )
