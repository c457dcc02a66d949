"""Pooling against loops over the real tokens."""

import math

import pytest
import torch
from torch import Tensor

from bigmodel.tasks.transfer_learning.pooling import Attention, First, Last, Mean, make_pool

MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


def attended(tokens: Tensor, query: Tensor) -> Tensor:
    scores = [math.exp(float(token @ query) / math.sqrt(len(query))) for token in tokens]
    return torch.stack([score / sum(scores) * token for score, token in zip(scores, tokens, strict=True)]).sum(0)


@pytest.mark.parametrize("kind", ["first", "mean", "last", "attention"])
def test_pooling_ignores_padding(kind: str) -> None:
    torch.manual_seed(0)
    tokens, query = torch.randn(3, 5, 4), torch.randn(4)
    tokens[~MASK] = 1e4  # what stands there must not matter
    attention = Attention(4)
    attention.query.data.copy_(query)
    pool = {"first": First(), "mean": Mean(), "last": Last(), "attention": attention}[kind]
    for row, mask, pooled in zip(tokens, MASK, pool(tokens, MASK), strict=True):
        real = row[mask]
        expected = {"first": real[0], "mean": real.mean(0), "last": real[-1], "attention": attended(real, query)}[kind]
        torch.testing.assert_close(pooled, expected)


def test_attention_pooling_starts_as_the_mean() -> None:
    tokens = torch.randn(3, 5, 4)
    attention = Attention(4)
    torch.testing.assert_close(attention(tokens, MASK), Mean()(tokens, MASK))
    attention(tokens, MASK).square().sum().backward()
    assert attention.query.grad is not None
    assert attention.query.grad.abs().sum() > 0


class Backbone:
    def __init__(self, pooling: str | None) -> None:
        self.pooling, self.width = pooling, 4


def test_auto_pooling_and_invalid_kinds() -> None:
    assert isinstance(make_pool("auto", Backbone("last")), Last)
    assert isinstance(make_pool("mean", Backbone("last")), Mean)
    assert make_pool("auto", Backbone(None)) is None
    with pytest.raises(ValueError, match=r"--model.pooling mean is for backbones of text"):
        make_pool("mean", Backbone(None))
    with pytest.raises(ValueError, match=r"--model.pooling max: accepted are auto, first, mean, last, attention"):
        make_pool("max", Backbone("mean"))  # type: ignore[arg-type]
