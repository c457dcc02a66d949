"""SASRec: predicts each next item with causal self-attention.

Source: Kang and McAuley 2018 (arXiv 1808.09781), eq. 1 to 6. As in its later implementations, heads are mixed by an output
projection, embeddings are scaled by sqrt(D), and there is a last norm before the scores.

B sequences, T positions, I items, D width.
"""

from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_probabilities, check_sizes
from bigmodel.nn.attention import NORM_EPS, AttentionKind
from bigmodel.nn.sequences import (
    Block,
    ItemScorer,
    NormPlace,
    SelfAttention,
    attention_mask,
    check_heads,
    check_items,
    draw_weights,
)


class SASRec(ItemScorer):
    """Maps items [B, T], padded with 0 on the left, to scores [B, T, I + 1] of each next item.

    A score is the product of the features of a position and the embedding of the item, which is shared between
    input and output.

    Args:
        num_items: items I.
        max_length: maximum number of items it attends to, the user's last ones.
        width: channels D of an item.
        depth: number of blocks.
        num_heads: attention heads; each has width / num_heads channels.
        mlp_width: hidden channels of a block's feed-forward net; null: width.
        norm: LayerNorm before a branch ("pre", the paper's) or after it ("post").
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
        num_heads: int = 1,
        mlp_width: int | None = None,
        norm: NormPlace = "pre",
        dropout: float = 0.2,
        init_std: float = 0.06,
        attention: AttentionKind = "auto",
    ) -> None:
        super().__init__(num_items, width)
        if mlp_width is None:
            mlp_width = width
        check_sizes(max_length=max_length, depth=depth, num_heads=num_heads, mlp_width=mlp_width)
        check_heads(width, num_heads)
        check_choice("attention", attention, AttentionKind)
        check_probabilities(dropout=dropout)
        self.max_length = max_length
        self.init_std = init_std

        self.embed_positions = nn.Embedding(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(width, num_heads, dropout=dropout, kind=attention),
                nn.Sequential(nn.Linear(width, mlp_width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(mlp_width, width)),
                width,
                norm=norm,
                dropout=dropout,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, NORM_EPS) if norm == "pre" else nn.Identity()
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
