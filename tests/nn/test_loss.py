"""Cross-entropy against torch's own, whole and in chunks, and what it keeps in memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigmodel.nn import cross_entropy_sum

B, T, D, V = 3, 7, 5, 11


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, T, D], the head's weight [V, D], both float64 with gradients, and targets, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(B, T, D, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, :3] = -100
    return features, weight, targets


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 21, 1000])
def test_value_and_gradients_equal_torch(chunk_size: int | None) -> None:
    features, weight, targets = problem()
    expected = F.cross_entropy((features @ weight.T).transpose(1, 2), targets, reduction="sum")
    loss, count = cross_entropy_sum(lambda x: x @ weight.T, features, targets, chunk_size)
    torch.testing.assert_close(loss, expected)
    assert count.dtype == torch.int64
    assert count.item() == B * T - 3
    torch.testing.assert_close(
        torch.autograd.grad(loss, (features, weight)), torch.autograd.grad(expected, (features, weight))
    )


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_nothing_counts(chunk_size: int | None) -> None:
    features, weight, targets = problem()
    loss, count = cross_entropy_sum(lambda x: x @ weight.T, features, torch.full_like(targets, -100), chunk_size)
    loss.backward()
    assert (loss.item(), count.item()) == (0, 0)
    assert features.grad is not None
    assert not features.grad.any()


def test_low_precision_logits_are_summed_in_float32() -> None:
    features = torch.zeros(1, 4000, V, dtype=torch.bfloat16)
    loss, _ = cross_entropy_sum(lambda x: x, features, torch.zeros(1, 4000, dtype=torch.int64))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, 4000 * torch.tensor(V).log())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor made under it."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize(("chunk_size", "positions"), [(None, 64), (8, 8)])
def test_logits_in_memory(chunk_size: int | None, positions: int) -> None:
    features = torch.randn(4, 16, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    with LargestTensor() as largest:
        loss, _ = cross_entropy_sum(lambda x: x @ weight.T, features, torch.zeros(4, 16, dtype=torch.int64), chunk_size)
        loss.backward()
    assert largest.num_elements == positions * 1000


def test_chunks_do_not_keep_their_logits_for_the_backward_pass() -> None:
    features = torch.randn(4, 16, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        cross_entropy_sum(lambda x: x @ weight.T, features, torch.zeros(4, 16, dtype=torch.int64), chunk_size=8)
    assert sum(saved) < 1000


def test_bad_arguments_are_refused() -> None:
    features, weight, targets = problem()
    with pytest.raises(ValueError, match="chunk_size is 0"):
        cross_entropy_sum(lambda x: x @ weight.T, features, targets, 0)
    with pytest.raises(ValueError, match=r"targets have shape \[3, 6\].*need \[3, 7\]"):
        cross_entropy_sum(lambda x: x @ weight.T, features, targets[:, 1:])
