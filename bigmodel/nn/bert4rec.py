"""BERT4Rec: predicts masked items of a sequence from the items on both sides.

Source: Sun et al. 2019 (arXiv 1904.06690), eq. 1 to 7.

B sequences, T positions, I items, D width, M width of the feed-forward net.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_probabilities, check_sizes
from bigmodel.nn.attention import NORM_EPS, AttentionKind
from bigmodel.nn.sequences import (
    Block,
    ItemScorer,
    SelfAttention,
    attention_mask,
    check_heads,
    check_items,
    draw_weights,
)
from bigmodel.nn.transformer import MLP


class BERT4Rec(ItemScorer):
    """Maps items [B, T], some of them masked, padded with 0 on the left, to scores [B, T, I + 1] of the item at each
    position.

    In contrast to the causal nets, the features of a position score the item at that position, not the
    next one. To train it, replace items by `mask_item` and predict them at their positions; some of the time only the
    last, as in recommendation. To recommend, read the last position of `features(mask_last(items))`.

    Args:
        num_items: items I; `mask_item` is I + 1.
        max_length: maximum number of items it attends to, the user's last ones, including the mask.
        width: channels D of an item.
        depth: number of blocks.
        num_heads: attention heads; each has width / num_heads channels.
        mlp_width: hidden channels M of a block's feed-forward net; null: 4 * width.
        dropout: probability, on embeddings, attention weights and the output of each branch.
        init_std: standard deviation of weights at the start.
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
        init_std: float = 0.02,
        attention: AttentionKind = "auto",
    ) -> None:
        super().__init__(num_items, width, num_extra=1, bias=True)
        if mlp_width is None:
            mlp_width = 4 * width
        check_sizes(max_length=max_length, depth=depth, num_heads=num_heads, mlp_width=mlp_width)
        check_heads(width, num_heads)
        check_choice("attention", attention, AttentionKind)
        check_probabilities(dropout=dropout)
        self.max_length = max_length
        self.mask_item = num_items + 1
        self.init_std = init_std

        self.embed_positions = nn.Embedding(max_length, width)
        self.embed_norm = nn.LayerNorm(width, NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(width, num_heads, dropout=dropout, kind=attention),
                MLP(width, mlp_width, "gelu", bias=True),
                width,
                norm="post",
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        draw_weights(self, self.init_std)

    def mask_last(self, items: Tensor) -> Tensor:
        """Return histories [B, T] with a mask after their last item, [B, T + 1]; if that is too long, without the first
        item.
        """
        mask = items.new_full((len(items), 1), self.mask_item)
        return torch.cat((items, mask), dim=1)[:, -self.max_length :]

    def features(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return the features that score the item at each position; only a masked item is hidden from the net.

        Args:
            items: [B, T], int64, at most `max_length` positions; 0 for padding, on the left; `mask_item` for a mask.
            times: not used.

        Returns:
            [B, T, D]; undefined but finite where there is padding.

        Raises:
            ValueError: too many positions, or an item number out of range.
        """
        check_items(items, self.max_length)
        positions = self.embed_positions.weight[self.max_length - items.shape[1] :]  # [T, D], the last is the end's
        x = self.dropout(self.embed_norm(self.embed(items) + positions))  # [B, T] -> [B, T, D]
        mask = attention_mask(items, causal=False)
        for block in self.blocks:
            x = block(x, mask)
        return F.gelu(self.head(x))

    def forward(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return scores [B, T, I + 1] of the item at each of items [B, T]; see `features`."""
        return self.logits(self.features(items, times))
