"""Many vectors into one: what stands for a text.

B texts, T tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

PoolingKind = Literal["auto", "first", "mean", "last", "attention"]


class First(nn.Module):
    """The first token's, the class token of BERT and its like: [B, T, D] -> [B, D]."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens[:, 0]


class Mean(nn.Module):
    """The mean over the real tokens: [B, T, D] -> [B, D]."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        shares = mask / mask.sum(1, keepdim=True)  # [B, T]
        return torch.einsum("bt,btd->bd", shares.to(tokens.dtype), tokens)


class Last(nn.Module):
    """The last real token's, the only one of a causal net that has read all of the text: [B, T, D] -> [B, D]."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * mask).amax(1)  # [B]
        return tokens[torch.arange(len(tokens), device=tokens.device), last]


class Attention(nn.Module):
    """A mean over the real tokens, weighted by how each answers one learned query q: softmax(x q / sqrt(D)) over T, as
    attention with one head whose keys and values are the tokens (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).
    [B, T, D] -> [B, D]. The query starts at zero: at first it is the mean.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        scores = (tokens @ self.query.to(tokens.dtype)).float() / tokens.shape[-1] ** 0.5  # [B, T]
        weights = scores.masked_fill(~mask, float("-inf")).softmax(1).to(tokens.dtype)
        return torch.einsum("bt,btd->bd", weights, tokens)


def make_pool(kind: PoolingKind, backbone: Any) -> nn.Module | None:
    """What pools a backbone's tokens; None for one that pools itself.

    Args:
        kind: how; auto: as the backbone has it, see `Backbone.pooling`.
        backbone: has `pooling` and `width`.

    Raises:
        ValueError: a kind that does not exist, or that this backbone cannot be pooled by.
    """
    if kind not in get_args(PoolingKind):
        raise ValueError(f"--model.pooling {kind} is not known; choose {', '.join(get_args(PoolingKind))}")
    if backbone.pooling is None:
        if kind != "auto":
            raise ValueError(
                f"--model.pooling {kind}: this backbone gives one vector for each picture, as it was trained to; set"
                " --model.pooling auto"
            )
        return None
    chosen = backbone.pooling if kind == "auto" else kind
    if chosen == "attention":
        return Attention(backbone.width)
    return {"first": First, "mean": Mean, "last": Last}[chosen]()
