"""Shared parts of the nets over item sequences: item embedding, masks, attention with padding, blocks.

Items are numbered 1..I, and 0 is padding, on the left of a sequence. A net never attends to it, and counts
positions from the right end, so that the amount of padding changes no score.

B sequences, T positions, I items, D width, H heads, K head size, M width of the feed-forward net.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_sizes
from bigmodel.nn.attention import NORM_EPS, AttentionKind

PADDING = 0
NormPlace = Literal["pre", "post"]
_MOST_EXPLICIT = 512  # positions, to bound the memory of the weights


class _PaddingWithoutGradient(torch.autograd.Function):
    """Identity of the table; its first row gets no gradient. It needs one copy of the gradient; masked logits would
    need a copy of [B, T, I + 1], and a concatenation a copy of the table in the forward pass as well.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        gradient[PADDING] = 0
        return gradient


def padding_without_gradient(table: Tensor) -> Tensor:
    """Return the table [I + 1, ...]; the gradient of its row 0 is always zero."""
    return _PaddingWithoutGradient.apply(table)


class ItemEmbedding(nn.Embedding):
    """Embedding with one row per item, a row of zeros for padding before them, and `num_extra` others after them.

    The row of padding stays zero: it gets no gradient, neither as an input nor where the table is the output matrix.

    Args:
        num_items: items I.
        width: channels D.
        num_extra: rows that are not items, such as a mask.
    """

    def __init__(self, num_items: int, width: int, num_extra: int = 0) -> None:
        super().__init__(1 + num_items + num_extra, width, padding_idx=PADDING)
        self.num_items = num_items

    def reset_parameters(self, std: float = 1.0) -> None:
        """Initialise all rows except that of padding from a normal distribution."""
        nn.init.normal_(self.weight, std=std)
        self._fill_padding_idx_with_zero()

    def forward(self, items: Tensor) -> Tensor:
        """Map items [...] to vectors [..., D].

        Raises:
            ValueError: an item outside of the table (on a CPU; an accelerator reports it as a failed device assertion).
        """
        try:
            return super().forward(items)
        except IndexError as error:
            raise ValueError(
                f"items go from {int(items.min())} to {int(items.max())}, but must be in 1 to {self.num_items}, or "
                "0 for padding; were the data prepared from other interactions?"
            ) from error

    @property
    def items(self) -> Tensor:
        """The rows of padding and items, [I + 1, D]."""
        return self.weight[: self.num_items + 1]


class ItemScorer(nn.Module):
    """A net that scores item i by features . vector_i, plus a bias where there is one.

    A subclass computes the features [..., D]. The vectors are the input embeddings of the items.

    Args:
        num_items: items I.
        width: channels D.
        num_extra: rows of the table that are not items.
        bias: add an `item_bias` [I + 1]; otherwise it is null.
    """

    def __init__(self, num_items: int, width: int, *, num_extra: int = 0, bias: bool = False) -> None:
        super().__init__()
        check_sizes(num_items=num_items, width=width)
        self.embed = ItemEmbedding(num_items, width, num_extra)
        self.item_bias = nn.Parameter(torch.zeros(num_items + 1)) if bias else None

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """Return vectors [..., D] of items [...]; without items the table [I + 1, D], whose row 0 is padding and zero."""
        return self.embed(items) if items is not None else padding_without_gradient(self.embed.items)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to scores [..., I + 1]; position 0 is padding, and has no meaning."""
        bias = None if self.item_bias is None else padding_without_gradient(self.item_bias)
        return F.linear(features, self.item_vectors(), bias)


def check_items(items: Tensor, max_length: int) -> None:
    """Raise an error unless items are sequences [B, T] of one to `max_length` items."""
    if items.ndim != 2 or items.shape[1] == 0:
        raise ValueError(f"items have shape {list(items.shape)}, but must be [sequences, positions], padded with 0")
    if items.shape[1] > max_length:
        raise ValueError(
            f"sequences of {items.shape[1]} items do not fit into the net's max_length {max_length}; give it their last "
            f"{max_length}, or train with a larger --data.max_length"
        )


def check_heads(width: int, num_heads: int) -> None:
    """Raise an error if the width is not divisible by the number of heads."""
    if width % num_heads:
        raise ValueError(
            f"width {width} is not divisible by num_heads {num_heads}; choose --model.net.width or "
            "--model.net.num_heads so that it is"
        )


def attention_mask(items: Tensor, *, causal: bool) -> Tensor:
    """Return the mask [B, 1, T, T], True where the position of the row may attend to the position of the column.

    No item attends to padding, nor to a later item if `causal`. Each position attends to itself, padding too; otherwise
    its softmax would be undefined.
    """
    length = items.shape[1]
    mask = (items != PADDING)[:, None, None, :]  # [B, 1, 1, T]
    if causal:
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=items.device).tril()
    return mask | torch.eye(length, dtype=torch.bool, device=items.device)


def _fastest_kind(query: Tensor, dropout: float) -> AttentionKind:
    """Return "explicit" on a CPU in bfloat16 or with dropout, for which torch's fused kernel is not optimised there.

    Forward and backward over 6400 positions, best of 7, ms on one busy core with AVX-512 bfloat16, torch 2.13, sdpa /
    explicit, without dropout and with:

    |  T  | H x K  |    fp32   | fp32 dropout |    bf16   | bf16 dropout |
    |  50 | 1 x 64 |  15 /  15 |   22 /  24   | 139 /  17 |   71 /  36   |
    |  50 | 2 x 64 |  30 /  31 |   57 /  48   | 176 /  21 |   86 /  52   |
    | 100 | 2 x 64 |  45 /  49 |   89 /  60   |  43 /   9 |   62 /  30   |
    | 200 | 1 x 64 |  38 /  42 |   71 /  65   |  41 /  14 |   76 /  34   |
    """
    if query.device.type != "cpu" or query.shape[2] > _MOST_EXPLICIT:
        return "sdpa"
    return "explicit" if dropout or query.dtype == torch.bfloat16 else "sdpa"


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, dropout: float = 0.0, kind: AttentionKind = "auto"
) -> Tensor:
    """Return softmax(q k' / sqrt(K)) v over the positions that the mask allows.

    Args:
        query, key, value: [B, H, T, K].
        mask: true where a row may attend to a column, [B, 1, T, T]; true somewhere in each row.
        dropout: probability to drop an attention weight.
        kind: "sdpa" is torch's fused kernel, "explicit" materialises the weights [B, H, T, T], "auto" takes the one
            measured faster (`_fastest_kind`).

    Returns:
        [B, H, T, K].
    """
    if kind == "auto":
        kind = _fastest_kind(query, dropout)
    if kind == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT  # [B, H, T, T]
    scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return F.dropout(scores.softmax(dim=-1).to(value.dtype), dropout) @ value


class SelfAttention(nn.Module):
    """x [B, T, D] -> [B, T, D], by a mask [B, 1, T, T]. The net that builds it checks the sizes.

    One projection makes queries, keys and values; its rows go by head, each with its query, key and value.
    """

    def __init__(self, width: int, num_heads: int, *, dropout: float, kind: AttentionKind) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.kind: AttentionKind = kind
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1))  # [B, T, 3 D] -> [B, T, H, 3, K]
        query, key, value = heads.transpose(1, 2).unbind(dim=3)  # each [B, H, T, K]
        dropout = self.dropout if self.training else 0.0
        mixed = masked_attention(query, key, value, mask, dropout=dropout, kind=self.kind)
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, H, T, K] -> [B, T, D]


class Block(nn.Module):
    """Attention, then a feed-forward net, each a branch with dropout at its end: x [B, T, D] -> [B, T, D].

    A branch f is x + f(norm(x)) where the norm is "pre", norm(x + f(x)) where it is "post".
    """

    def __init__(
        self, attention: SelfAttention, mlp: nn.Module, width: int, *, norm: NormPlace, dropout: float
    ) -> None:
        super().__init__()
        check_choice("norm", norm, NormPlace)
        self.place: NormPlace = norm
        self.attention_norm = nn.LayerNorm(width, NORM_EPS)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width, NORM_EPS)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.place == "pre":
            x = x + self.dropout(self.attention(self.attention_norm(x), mask))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


def draw_weights(net: nn.Module, std: float) -> None:
    """Initialise from torch's random state: tables and matrices normal with this deviation, biases 0, norms 1."""
    for module in net.modules():
        if isinstance(module, ItemEmbedding):
            module.reset_parameters(std)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, ItemScorer) and module.item_bias is not None:
            nn.init.zeros_(module.item_bias)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
