"""Pooling of the token features of a text to one vector.

B texts, T tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

PoolingKind = Literal["auto", "first", "mean", "last", "attention"]


class First(nn.Module):
    """Selects the first token, the class token of BERT and similar models: [B, T, D] -> [B, D]."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens[:, 0]


class Mean(nn.Module):
    """Averages over the real tokens: [B, T, D] -> [B, D]."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        shares = mask / mask.sum(1, keepdim=True)  # [B, T]
        return torch.einsum("bt,btd->bd", shares.to(tokens.dtype), tokens)


class Last(nn.Module):
    """Selects the last real token, the only one of a causal net that depends on the whole text: [B, T, D] -> [B, D]."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask).amax(1)  # [B]
        return tokens[torch.arange(len(tokens), device=tokens.device), last]


class Attention(nn.Module):
    """Averages over the real tokens with weights from one learned query q: softmax(x q / sqrt(D)) over T, as in
    attention with one head whose keys and values are the tokens (Vaswani et al. 2017, arXiv 1706.03762, eq. 1). [B, T,
    D] -> [B, D]. The query starts at zero: at first it is the plain mean.

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
    """Return the pooling module of a backbone's tokens; None for a backbone that pools itself.

    Args:
        kind: type of pooling; auto: that of the backbone, see `Backbone.pooling`.
        backbone: has `pooling` and `width`.

    Raises:
        ValueError: an unknown kind, or one that this backbone does not support.
    """
    if kind not in get_args(PoolingKind):
        raise ValueError(f"--model.pooling {kind}: accepted are {', '.join(get_args(PoolingKind))}")
    if backbone.pooling is None:
        if kind != "auto":
            raise ValueError(
                f"--model.pooling {kind} is for backbones of text, and this one pools images itself: set --model.pooling"
                " auto"
            )
        return None
    chosen = backbone.pooling if kind == "auto" else kind
    if chosen == "attention":
        return Attention(backbone.width)
    return {"first": First, "mean": Mean, "last": Last}[chosen]()
