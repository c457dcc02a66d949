"""Attention against a loop over queries, in both forms."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel.nn.attention import causal_attention, rotary_angles, rotate


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def attention_by_loop(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(q k' / sqrt(K)) v, one query at a time."""
    output = torch.empty_like(query)
    num_heads, length, head_size = query.shape[1:]
    num_kv_heads, num_keys = keys.shape[1:3]
    for b in range(len(query)):
        for h in range(num_heads):
            g = h * num_kv_heads // num_heads
            for t in range(length):
                seen = num_keys - length + t + 1
                weights = (keys[b, g, :seen] @ query[b, h, t] / math.sqrt(head_size)).softmax(-1)
                output[b, h, t] = weights @ values[b, g, :seen]
    return output


@pytest.mark.parametrize("length", [9, 4, 1], ids=["no cache", "some cached", "one new token"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_attention_equals_a_loop_in_value_and_gradient(length: int, num_kv_heads: int) -> None:
    query = torch.randn(2, 4, length, 8, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, num_kv_heads, 9, 8, dtype=torch.float64, requires_grad=True)
    values = torch.randn_like(keys, requires_grad=True)
    direction = torch.randn_like(query)
    expected = attention_by_loop(query, keys, values)
    gradients = torch.autograd.grad(expected, (query, keys, values), direction)
    for kind in ("sdpa", "explicit"):
        output = causal_attention(query, keys, values, kind=kind)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad(output, (query, keys, values), direction), gradients)


def test_grouped_queries_equal_repeated_key_heads() -> None:
    query, keys, values = torch.randn(2, 6, 10, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
    repeated = [x.repeat_interleave(3, dim=1) for x in (keys, values)]
    for kind in ("sdpa", "explicit"):
        grouped = causal_attention(query, keys, values, kind=kind)
        torch.testing.assert_close(grouped, causal_attention(query, *repeated, kind=kind))


def test_explicit_attention_in_bfloat16_errs_no_more_than_its_rounding() -> None:
    query, keys, values = (torch.randn(2, 4, 64, 32).bfloat16() for _ in range(3))
    exact = causal_attention(query.double(), keys.double(), values.double(), kind="sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        output = causal_attention(query, keys, values, kind="explicit")
    assert output.dtype == torch.bfloat16
    # bfloat16 rounds by at most 2^-9: the score, the weight and the output once each.
    assert (output.double() - exact).abs().max() < 3 * 2**-9 * values.abs().max()


def test_attention_dropout_keeps_the_expectation() -> None:
    query, keys, values = torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4), torch.rand(1, 1, 8, 4)
    exact = causal_attention(query, keys, values)
    for kind in ("sdpa", "explicit"):
        many = [x.expand(4000, -1, -1, -1) for x in (query, keys, values)]
        dropped = causal_attention(*many, dropout=0.25, kind=kind)
        torch.testing.assert_close(dropped.mean(0, keepdim=True), exact, atol=0.04, rtol=0)
        assert (dropped[:, 0, 0] == 0).all(-1).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("dtype", "head_size", "length", "fused"),
    [
        (torch.bfloat16, 32, 256, False),
        (torch.bfloat16, 32, 257, True),
        (torch.bfloat16, 128, 513, True),
        (torch.float32, 64, 128, False),
        (torch.float32, 64, 129, True),
    ],
)
def test_auto_takes_the_form_measured_faster(
    dtype: torch.dtype, head_size: int, length: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    kernel = F.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(True)
        return kernel(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    x = torch.randn(1, 1, length, head_size, dtype=dtype)
    causal_attention(x, x, x)
    assert bool(calls) == fused


def test_rotation_turns_pairs_by_complex_multiplication() -> None:
    x = torch.randn(2, 3, 5, 8)
    rotated = rotate(x, rotary_angles(7, 5, 8, 100.0, x.device))
    pairs = torch.complex(x[..., :4], x[..., 4:])
    for t in range(5):
        turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in [(7 + t) * 100 ** (-i / 4) for i in range(4)]])
        torch.testing.assert_close(torch.complex(rotated[..., :4], rotated[..., 4:])[:, :, t], pairs[:, :, t] * turn)


def test_rotated_products_depend_on_distance_only() -> None:
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(i: int, j: int) -> Tensor:
        a, b = (rotate(x, rotary_angles(n, 1, 16, 10_000.0, x.device)) for x, n in ((query, i), (key, j)))
        return (a * b).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), atol=1e-5, rtol=1e-5)
    assert (product(9, 4) - product(9, 5)).abs() > 1e-3
