"""eSASRec: SASRec with gated blocks.

Sources: Tikhonovich et al. 2025 (arXiv 2508.06450), which trains it with sampled softmax; the LiGR block, Borisyuk et al.
2025 (arXiv 2502.03417); SwiGLU, Shazeer 2020 (arXiv 2002.05202), eq. 6.

B sequences, T positions, I items, D width, M width of the feed-forward net.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_probabilities, check_sizes
from bigmodel.nn.attention import NORM_EPS, AttentionKind
from bigmodel.nn.sequences import (
    ItemScorer,
    SelfAttention,
    attention_mask,
    check_heads,
    check_items,
    draw_weights,
)


class SwiGLU(nn.Module):
    """(silu(x G) * x U) W, with dropout on the M hidden channels: [..., D] -> [..., D]."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))


class GatedBlock(nn.Module):
    """Attention, then a feed-forward net, each x + f(norm(x)) * sigmoid(W x + b): [B, T, D] -> [B, T, D].

    The gate reads the branch's own input x, before the norm.
    """

    def __init__(self, attention: SelfAttention, mlp: SwiGLU, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, NORM_EPS)
        self.attention = attention
        self.attention_gate = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, NORM_EPS)
        self.mlp = mlp
        self.mlp_gate = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask)) * self.attention_gate(x).sigmoid()
        return x + self.dropout(self.mlp(self.mlp_norm(x))) * self.mlp_gate(x).sigmoid()


class ESASRec(ItemScorer):
    """Maps items [B, T], padded with 0 on the left, to scores [B, T, I + 1] of each next item.

    Args:
        num_items: items I.
        max_length: maximum number of items it attends to, the user's last ones.
        width: channels D of an item.
        depth: number of blocks.
        num_heads: attention heads; each has width / num_heads channels.
        mlp_width: hidden channels M of a block's feed-forward net; null: 4 * width.
        dropout: probability, on embeddings, attention weights, hidden channels and the output of each branch.
        init_std: standard deviation of weights at the start; a value for 64 channels is too large for many more.
        attention: "sdpa", "explicit", or "auto" for the faster one by measurement.

    Raises:
        ValueError: inconsistent sizes, or an unknown choice.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        *,
        width: int = 64,
        depth: int = 2,
        num_heads: int = 2,
        mlp_width: int | None = None,
        dropout: float = 0.2,
        init_std: float = 0.06,
        attention: AttentionKind = "auto",
    ) -> None:
        super().__init__(num_items, width)
        if mlp_width is None:
            mlp_width = 4 * width
        check_sizes(max_length=max_length, depth=depth, num_heads=num_heads, mlp_width=mlp_width)
        check_heads(width, num_heads)
        check_choice("attention", attention, AttentionKind)
        check_probabilities(dropout=dropout)
        self.max_length = max_length
        self.init_std = init_std

        self.embed_positions = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            GatedBlock(
                SelfAttention(width, num_heads, dropout=dropout, kind=attention),
                SwiGLU(width, mlp_width, dropout),
                width,
                dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        draw_weights(self, self.init_std)

    def features(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return the features that score the item after each position.

        Args:
            items: [B, T], int64, at most `max_length` positions; 0 for padding, on the left.
            times: not used.

        Returns:
            [B, T, D]; undefined but finite where there is padding.

        Raises:
            ValueError: too many positions, or an item number out of range.
        """
        check_items(items, self.max_length)
        positions = self.embed_positions.weight[self.max_length - items.shape[1] :]  # [T, D], the last is the end's
        x = self.dropout(self.embed(items) * self.embed.embedding_dim**0.5 + positions)  # [B, T] -> [B, T, D]
        mask = attention_mask(items, causal=True)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def forward(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return scores [B, T, I + 1] of the item after each of items [B, T]; see `features`."""
        return self.logits(self.features(items, times))
