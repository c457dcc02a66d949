"""Cross-entropy as a sum and a count, in chunks where the vocabulary is large.

A mean over a batch cannot be averaged with other batches' means when their counts differ; a sum and a count can. In
chunks, logits are recomputed in the backward pass (Chen et al. 2016, arXiv 1604.06174), so that only one chunk of them
is in memory at a time.

B batch, T tokens, N = B * T, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def cross_entropy_sum(
    logits_fn: Callable[[Tensor], Tensor], features: Tensor, targets: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum of -log softmax(logits)[target] over the targets that count, and their number.

    Args:
        logits_fn: maps features [..., D] to logits [..., V], each position separately.
        features: [B, T, D], or any shape that ends in D.
        targets: class indices of that shape without D, int64; -100 is ignored.
        chunk_size: positions (tokens) whose logits are in memory at once, forward and backward; costs one more
            evaluation of `logits_fn`. None for all of them.

    Returns:
        The sum in nats, a scalar in float32 (float64 for float64 logits), and the count, a scalar in int64.

    Raises:
        ValueError: a chunk size below one, or shapes that do not match.
    """
    if targets.shape != features.shape[:-1]:
        raise ValueError(
            f"targets have shape {list(targets.shape)}, but features of shape {list(features.shape)} "
            f"need {list(features.shape[:-1])}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but must be at least 1 or None; choose --model.loss_chunk_size")
    count = (targets != IGNORE_INDEX).sum()
    features = features.flatten(0, -2)  # [B, T, D] -> [N, D]
    targets = targets.flatten()  # [B, T] -> [N]

    def loss_of(features: Tensor, targets: Tensor) -> Tensor:
        logits = logits_fn(features)  # [n, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        # For logits sharded over the vocabulary (tensor parallelism) it is a DTensor, the same on each process.
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    if chunk_size is None or chunk_size >= len(targets):
        return loss_of(features, targets), count
    losses = [
        checkpoint(loss_of, *chunk, use_reentrant=False)
        for chunk in zip(features.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return torch.stack(losses).sum(), count
