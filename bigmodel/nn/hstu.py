"""HSTU: attention without softmax, so that the amount of activity counts, with biases for distance and elapsed time.

Source: Zhai et al. 2024 (arXiv 2402.17152), eq. 1 to 3, and its implementation for buckets of time and the norms. There,
a position uses the time of the item to be predicted; here only its own.

B sequences, T positions, N max_length, I items, D width, H heads, K = D / H head size, G buckets of time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_probabilities, check_sizes
from bigmodel.nn.sequences import PADDING, ItemScorer, check_heads, check_items, draw_weights

_NORM_EPS = 1e-6
_LOG_BUCKET = 0.301  # a bucket's seconds are 1.35 times those of the one before


def time_buckets(times: Tensor, num_buckets: int) -> Tensor:
    """Return the bucket of the time between two positions: floor(ln(max(1, |t_i - t_j|)) / 0.301), at most the last.

    Args:
        times: [B, T], int64, seconds.
        num_buckets: buckets G; 72 cover differences of up to 60 years.

    Returns:
        [B, T, T], int64, from 0 to G - 1.
    """
    elapsed = (times[:, :, None] - times[:, None, :]).abs().clamp(min=1)  # [B, T, T]
    # Subtracted as integers: float32 resolves present-day times to two minutes only.
    return (elapsed.float().log() / _LOG_BUCKET).long().clamp(max=num_buckets - 1)


class HSTUBlock(nn.Module):
    """x + (norm(A V) * U) W, with A = silu(Q K' + position bias + time bias) / N: [B, T, D] -> [B, T, D].

    U, V, Q, K are silu(norm(x) F). Norms have no weights. All heads share the biases.
    """

    def __init__(self, width: int, num_heads: int, max_length: int, num_buckets: int, dropout: float) -> None:
        super().__init__()
        self.width, self.num_heads, self.max_length = width, num_heads, max_length
        self.uvqk = nn.Linear(width, 4 * width, bias=False)
        # Plain vectors: the gradient of an embedding takes 100 times as long for a table with so many look-ups.
        self.position_bias = nn.Parameter(torch.empty(max_length))  # by distance, from 0
        self.time_bias = nn.Parameter(torch.empty(num_buckets)) if num_buckets else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, distances: Tensor, buckets: Tensor | None) -> Tensor:
        """Mask [B, 1, T, T], true where a row may attend to a column; distances [T, T]; buckets [B, T, T]."""
        projected = F.silu(self.uvqk(F.layer_norm(x, [self.width], eps=_NORM_EPS)))  # [B, T, 4 D]
        gate, *heads = projected.chunk(4, dim=-1)
        value, query, key = (h.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for h in heads)  # [B, H, T, K]
        bias = self.position_bias[distances]  # [T, T]
        if self.time_bias is not None and buckets is not None:
            bias = (bias + self.time_bias[buckets]).unsqueeze(1)  # [B, 1, T, T]
        weights = F.silu(query @ key.mT + bias) / self.max_length  # [B, H, T, T]
        mixed = weights.masked_fill(~mask, 0.0).to(value.dtype) @ value  # [B, H, T, K]
        mixed = F.layer_norm(mixed.transpose(1, 2).flatten(2), [self.width], eps=_NORM_EPS)  # [B, T, D]
        return x + self.out(self.dropout(mixed * gate))


class HSTU(ItemScorer):
    """Items [B, T], padded with 0 at the left, and their times [B, T] in; scores [B, T, I + 1] of each next item out.

    Args:
        num_items: items I.
        max_length: maximum number of items it attends to, the user's last ones.
        width: channels D of an item.
        depth: number of blocks.
        num_heads: attention heads; each has width / num_heads channels.
        num_time_buckets: buckets of elapsed time, each 1.35 times as long as the one before, from a second; 0: times
            are not used.
        dropout: probability, on embeddings and the output of each block's branch.
        init_std: standard deviation of weights at the start.

    Raises:
        ValueError: inconsistent sizes.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        *,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        num_time_buckets: int = 72,
        dropout: float = 0.2,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(num_items, width)
        check_sizes(max_length=max_length, depth=depth, num_heads=num_heads)
        check_heads(width, num_heads)
        check_probabilities(dropout=dropout)
        if num_time_buckets < 0:
            raise ValueError(
                f"num_time_buckets is {num_time_buckets}, but must be at least 0; choose --model.net.num_time_buckets"
            )
        self.max_length = max_length
        self.num_time_buckets = num_time_buckets
        self.init_std = init_std
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            HSTUBlock(width, num_heads, max_length, num_time_buckets, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, _NORM_EPS)
        self.reset_parameters()

    @property
    def reads_times(self) -> bool:
        """True if times are used."""
        return self.num_time_buckets > 0

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        draw_weights(self, self.init_std)
        for module in self.modules():
            if isinstance(module, HSTUBlock):
                nn.init.normal_(module.position_bias, std=self.init_std)
                if module.time_bias is not None:
                    nn.init.normal_(module.time_bias, std=self.init_std)

    def features(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return the features that score the item after each position.

        Args:
            items: [B, T], int64, at most `max_length` positions; 0 for padding, on the left.
            times: times of the items, [B, T], int64, seconds; any value where there is padding.

        Returns:
            [B, T, D]; undefined but finite where there is padding.

        Raises:
            ValueError: too many positions, an item number out of range, or times that are missing or of another
                shape.
        """
        check_items(items, self.max_length)
        buckets = None
        if self.num_time_buckets:
            if times is None:
                raise ValueError(
                    "HSTU uses the times of items, but got none; give them, or train with --model.net.num_time_buckets 0"
                )
            if times.shape != items.shape:
                raise ValueError(f"times have shape {list(times.shape)}, but items have {list(items.shape)}")
            buckets = time_buckets(times, self.num_time_buckets)
        positions = torch.arange(items.shape[1], device=items.device)
        distances = positions[:, None] - positions  # [T, T]
        mask = (items != PADDING)[:, None, None, :] & (distances >= 0)  # [B, 1, T, T]
        distances = distances.clamp(min=0)
        x = self.dropout(self.embed(items) * self.embed.embedding_dim**0.5)  # [B, T] -> [B, T, D]
        for block in self.blocks:
            x = block(x, mask, distances, buckets)
        return self.norm(x)

    def forward(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return scores [B, T, I + 1] of the item after each of items [B, T]; see `features`."""
        return self.logits(self.features(items, times))
