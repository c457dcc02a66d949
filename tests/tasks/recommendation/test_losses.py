"""Losses against constants, torch's own, and loops over positions; what is in memory; a net that learns by each."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigmodel.nn import MatrixFactorization
from bigmodel.tasks.recommendation import losses
from bigmodel.tasks.recommendation.losses import (
    BCE,
    BPR,
    GBCE,
    FullSoftmax,
    SampledSoftmax,
    bce_sum,
    bpr_sum,
    gbce_beta,
    sampled_softmax_sum,
)
from bigmodel.tasks.recommendation.negatives import DrawKeys
from bigmodel.tasks.recommendation.ranking import dot_products, rank_and_top_k

B, T, D, N = 4, 6, 5, 30
COUNTS = torch.arange(N + 1) % 7  # some items are never met
LOSSES = {
    "full": FullSoftmax(),
    "sampled": SampledSoftmax(16),
    "sampled by popularity": SampledSoftmax(16, popularity=True),
    "bce": BCE(2),
    "gbce": GBCE(8),
    "bpr": BPR(2),
}


class Net(nn.Module):
    """What comes after a sequence: a mean of what was, with decay, turned by a matrix."""

    def __init__(self, num_items: int, max_length: int, width: int = D) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.turn = nn.Linear(width, width)

    def features(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        x, states = self.embed(items), []  # [B, T, D]
        state = torch.zeros_like(x[:, 0])
        for t in range(items.shape[1]):
            state = 0.1 * state + x[:, t]
            states.append(state)
        return self.turn(torch.stack(states, 1))

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        return self.embed.weight if items is None else self.embed(items)

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.embed.weight.T


def problem() -> tuple[Net, Tensor, Tensor, DrawKeys]:
    """A net, features [B, T, D] of leaves, targets [B, T], some of them 0, and keys."""
    torch.manual_seed(0)
    net, features = Net(N, T), torch.randn(B, T, D, requires_grad=True)
    targets = torch.randint(1, N + 1, (B, T))
    targets[0, :4] = targets[2] = 0
    return net, features, targets, DrawKeys.of(1, 2, torch.arange(B), T)


def outcome(loss: Any, net: Net, features: Tensor, targets: Tensor, keys: DrawKeys) -> tuple[Tensor, ...]:
    """Sum, count, and gradients of features and table."""
    loss.prepare(N, COUNTS)
    total, count = loss(net, features, targets, keys)
    return total.detach(), count, *torch.autograd.grad(total, (features, net.embed.weight))


def test_full_softmax_leaves_padding_out() -> None:
    net, features, targets, keys = problem()
    expected = F.cross_entropy(
        net.logits(features)[..., 1:].flatten(0, 1), targets.flatten() - 1, ignore_index=-1, reduction="sum"
    )
    expected_grads = torch.autograd.grad(expected, (features, net.embed.weight))
    for chunk_size in (None, 5):
        total, count, *grads = outcome(FullSoftmax(chunk_size), net, features, targets, keys)
        torch.testing.assert_close((total, *grads), (expected.detach(), *expected_grads))
        assert count == (targets > 0).sum()
        assert not grads[1][0].any()  # of padding


def test_sampled_softmax_over_all_items_is_the_full_one() -> None:
    net, features, targets, keys = problem()
    total, count = sampled_softmax_sum(net, features, targets, torch.arange(1, N + 1), torch.zeros(N))
    found = total.detach(), count, *torch.autograd.grad(total, (features, net.embed.weight))
    torch.testing.assert_close(found, outcome(FullSoftmax(), net, features, targets, keys))


@pytest.mark.parametrize("popularity", [False, True])
def test_sampled_softmax_estimates_the_sum_over_all_items(popularity: bool) -> None:
    net, features, targets, _ = problem()
    loss = SampledSoftmax(2000, popularity)
    counts = COUNTS.clamp(min=1)
    loss.prepare(N, counts)
    full = FullSoftmax()(net, features, targets, DrawKeys.of(0, 0, torch.arange(B), T))[0].item()
    found = [loss(net, features, targets, DrawKeys.of(0, step, torch.arange(B), T))[0].item() for step in range(50)]
    assert abs(sum(found) / 50 - full) < 0.01 * full
    assert len(set(found)) == 50


def test_constants_of_bce_and_gbce() -> None:
    positive, negative = torch.tensor([1.0]).double(), torch.tensor([[0.5, -0.5]]).double()
    for t, beta, expected in ((0, 1, 0.5871385520), (0.75, 0.4166667, 0.5262265572), (1, 0.2222222, 0.5059225589)):
        assert gbce_beta(2, 10, t) == pytest.approx(beta, abs=1e-7)
        found, count = bce_sum(positive, negative, beta=gbce_beta(2, 10, t))
        assert found.item() == pytest.approx(expected, abs=1e-10)
        assert count == 1


def test_pairs() -> None:
    positive, negative = torch.randn(7).double(), torch.randn(7, 3).double()
    total, count = bpr_sum(positive, negative)
    expected = (
        -sum(math.log(1 / (1 + math.exp(n - p))) for p, row in zip(positive, negative, strict=True) for n in row) / 3
    )
    assert total.item() == pytest.approx(expected)
    assert count == 7


@pytest.mark.parametrize("name", ["bce", "gbce", "bpr"])
def test_negatives_of_each_position_against_a_loop(name: str) -> None:
    net, features, targets, keys = problem()
    loss = LOSSES[name]
    loss.prepare(N, COUNTS)
    items = loss.negatives.draw(keys.positions.flatten(), loss.num_negatives).view(B, T, -1)
    targets[1, 1] = items[1, 1, 0]  # drawn by accident
    expected, n = 0.0, loss.num_negatives
    vectors = net.embed.weight.detach()
    for b in range(B):
        for t in range(T):
            if targets[b, t] == 0:
                continue
            s = [float(features[b, t].detach() @ vectors[i]) for i in [targets[b, t], *items[b, t]]]
            others = [x for x, i in zip(s[1:], items[b, t], strict=True) if i != targets[b, t]]
            if name == "bpr":
                expected += sum(math.log1p(math.exp(x - s[0])) for x in others) / n
            else:
                beta = gbce_beta(n, N, 0.75) if name == "gbce" else 1
                positive = beta * math.log1p(math.exp(-s[0]))
                expected += (positive + sum(math.log1p(math.exp(x)) for x in others)) / (n + 1)
    total, count = loss(net, features, targets, keys)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count == (targets > 0).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_neither_layout_nor_chunks_nor_left_out_positions_change_a_loss(name: str, monkeypatch) -> None:
    net, features, targets, keys = problem()
    whole = outcome(LOSSES[name], net, features, targets, keys)
    parts = torch.stack(
        [
            torch.stack(LOSSES[name](net, features[i], targets[i], DrawKeys.of(1, 2, torch.arange(B)[i], T)))
            for i in (slice(0, 1), slice(1, B))
        ]
    ).sum(0)
    torch.testing.assert_close(parts.detach(), torch.stack(whole[:2]).to(parts.dtype))
    real = targets > 0
    total, count = LOSSES[name](net, features[real], targets[real], keys._replace(positions=keys.positions[real]))
    torch.testing.assert_close((total.detach(), count), whole[:2])
    monkeypatch.setattr(losses, "_NUMBERS_AT_ONCE", 100)
    torch.testing.assert_close(outcome(LOSSES[name], net, features, targets, keys), whole)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor made under it."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize(
    ("loss", "elements"),
    [
        (FullSoftmax(), 512 * 10_001),
        (FullSoftmax(64), 10_001 * 64),  # a chunk of scores
        (SampledSoftmax(100), 10_001 * 16),  # the gradient of the table
        (GBCE(100), 10_001 * 16),  # each chunk's vectors are fewer numbers than that
    ],
)
def test_what_is_in_memory(loss: Any, elements: int, monkeypatch) -> None:
    monkeypatch.setattr(losses, "_NUMBERS_AT_ONCE", 1 << 17)
    net = Net(10_000, 8, 16)
    features, targets = torch.randn(64, 8, 16, requires_grad=True), torch.randint(1, 10_001, (64, 8))
    loss.prepare(10_000)
    keys = DrawKeys.of(0, 0, torch.arange(64), 8)
    with LargestTensor() as largest:
        loss(net, features, targets, keys)[0].backward()
    assert largest.num_elements == elements


@pytest.mark.parametrize("name", LOSSES)
def test_a_net_learns_cycles_by_each_of_them(name: str) -> None:
    """Users walk round cycles of items; which item comes next is then known, and is ranked first."""
    torch.manual_seed(0)
    net, loss = Net(N, T, 32), LOSSES[name]
    loss.prepare(N, torch.ones(N + 1, dtype=torch.int64))
    walks = (torch.arange(T + 1) + torch.arange(N)[:, None]) % N + 1  # [N, T + 1]
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for step in range(60):
        keys = DrawKeys.of(0, step, torch.arange(N), T)
        total, count = loss(net, net.features(walks[:, :-1]), walks[:, 1:], keys)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    queries = net.features(walks[:, :-1])[:, -1]
    scores = dot_products(queries, net.item_vectors())
    ranks, items = rank_and_top_k(scores, N, 3, walks[:, -1:], walks[:, :-1])
    assert (ranks == 1).all()
    assert torch.equal(items[:, 0], walks[:, -1])


def test_bad_options_are_refused() -> None:
    for make, message in (
        (lambda: FullSoftmax(0), "loss.chunk_size 0: must be"),
        (lambda: SampledSoftmax(0), "loss.num_negatives 0: must be"),
        (lambda: GBCE(4, t=1.5), r"loss.t 1.5: must be in 0 to 1"),
        (lambda: GBCE(30).prepare(30), "num_negatives 30: must be below the number of items, 30"),
        (lambda: BPR(popularity=True).prepare(30), "popularity true needs the number of events"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    net, features, targets, keys = problem()
    loss = BCE()
    loss.prepare(N)
    with pytest.raises(ValueError, match=r"keys \[6, 4\] and targets \[4, 6\]"):
        loss(net, features, targets, keys._replace(positions=keys.positions.T))


def test_an_item_bias_counts_in_every_loss():
    torch.manual_seed(0)
    net = MatrixFactorization(num_users=3, num_items=N, width=D)
    nn.init.normal_(net.item_bias)
    features, targets = torch.randn(4, D), torch.tensor([1, 2, 3, 4])
    every = torch.arange(1, N + 1)
    sampled, _ = sampled_softmax_sum(net, features, targets, every, torch.zeros(N))
    full, _ = FullSoftmax()(net, features, targets, DrawKeys.of(0, 0, torch.arange(4)))
    torch.testing.assert_close(sampled, full)
    for loss in (BCE(num_negatives=5), BPR(num_negatives=5)):
        loss.prepare(N)
        value, _ = loss(net, features, targets, DrawKeys.of(0, 0, torch.arange(4)))
        (gradient,) = torch.autograd.grad(value, net.item_bias)
        assert (gradient[targets] < 0).all(), "the bias of what is chosen rises"
