"""Ranks and lists against brute force, ties, blocks, and what they keep in memory."""

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigmodel.tasks.recommendation.ranking import dot_products, rank, rank_and_top_k, sampled_rank, scores_of, top_k

B, N, H, K = 6, 23, 9, 3


def block_of(scores: Tensor):
    """A score_block of scores [B, N + 1]."""
    return lambda first, last: scores[:, first:last]


def problem(ties: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, N + 1], that of padding the highest; targets [B, K] and history [B, H], with padding in odd places,
    repeated items, and targets that were met before."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, N + 1, generator=generator)
    if ties:
        scores = scores.round()
    scores[:, 0] = 100
    items = torch.stack([torch.randperm(N, generator=generator) + 1 for _ in range(B)])
    targets, history = items[:, :K].clone(), items[:, K : K + H].clone()
    targets[1, 0] = targets[2, 1:] = targets[4] = 0
    history[0, 3:] = history[3, 0] = 0
    history[1, 4] = history[1, 5]
    history[0, 1], history[5, 2] = targets[0, 0], targets[5, 1]
    return scores, targets, history


def brute_force(scores: Tensor, targets: Tensor, history: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Ranks and whole lists, by sorting (score descending; others before targets)."""
    ranks, lists = [], []
    for s, wanted, seen in zip(scores.tolist(), targets.tolist(), history.tolist(), strict=True):
        allowed = [i for i in range(1, N + 1) if i in wanted or i not in seen]
        worst = sorted(allowed, key=lambda i: (-s[i], i in wanted))
        # Of targets that tie with each other, the later one stands first.
        ranks.append([0 if t == 0 else rank_of(t, worst, s, wanted) for t in wanted])
        lists.append(sorted(allowed, key=lambda i: (-s[i], i)))
    return ranks, lists


def rank_of(t: int, worst: list[int], s: list[float], wanted: list[int]) -> int:
    tied = [i for i in wanted if i and s[i] == s[t]]
    last = max(worst.index(i) for i in tied) + 1
    return last - tied.index(t)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block_size", [None, 1, 5, 8])
def test_equal_brute_force(ties: bool, block_size: int | None) -> None:
    for seed in range(20):
        scores, targets, history = problem(ties, seed)
        ranks, lists = brute_force(scores, targets, history)
        assert rank(block_of(scores), N, targets, history, block_size).tolist() == ranks
        first = [rank(block_of(scores), N, targets[:, [j]], history, block_size)[:, 0].tolist() for j in range(K)]
        alone = [brute_force(scores, targets[:, [j]], history)[0] for j in range(K)]
        assert first == [[row[0] for row in column] for column in alone]

        both, items = rank_and_top_k(block_of(scores), N, 7, targets, history, block_size)
        assert both.tolist() == ranks
        assert items.tolist() == [best[:7] for best in lists]
        items, values = top_k(block_of(scores), N, 7, history, block_size)
        _, lists = brute_force(scores, torch.zeros_like(targets), history)
        assert items.tolist() == [best[:7] for best in lists]
        assert torch.equal(values, scores.gather(1, items))
        assert torch.equal(scores, problem(ties, seed)[0])  # nothing was written to them


@pytest.mark.parametrize("block_size", [None, 4])
def test_ranks_among_a_sample(block_size: int | None) -> None:
    scores, targets, negatives = problem(ties=True)
    negatives[0, 1] = negatives[5, 2] = 0  # were targets
    expected = [
        [0 if t == 0 else 1 + sum(s[j] >= s[t] for j in drawn if j) for t in wanted]
        for s, wanted, drawn in zip(scores.tolist(), targets.tolist(), negatives.tolist(), strict=True)
    ]
    assert sampled_rank(block_of(scores), N, targets, negatives, block_size).tolist() == expected
    picked = scores_of(block_of(scores), N, targets, block_size)
    assert torch.equal(picked, torch.where(targets > 0, scores.gather(1, targets), 0))


def test_constant_scores_rank_last() -> None:
    targets, history = torch.tensor([[4], [2]]), torch.tensor([[1, 2, 0], [5, 0, 0]])
    assert rank(block_of(torch.zeros(2, 7)), 6, targets, history).tolist() == [[4], [5]]
    # Distinct ranks for targets that tie: the list has one item at each place.
    assert sorted(rank(block_of(torch.zeros(1, 7)), 6, torch.tensor([[4, 2, 6]]), history[:1])[0].tolist()) == [3, 4, 5]


def test_lists_end_where_items_do() -> None:
    items, scores = top_k(block_of(torch.zeros(1, 4)), 3, 3, torch.tensor([[2, 2]]))
    assert items.tolist() == [[1, 3, 0]]
    assert scores.tolist() == [[0, 0, -torch.inf]]


def test_scores_of_low_precision_tables_are_float32_under_autocast() -> None:
    queries, table = torch.randn(3, 8), torch.randn(11, 8).bfloat16()
    bias = torch.randn(11)
    with torch.autocast("cpu", torch.bfloat16):
        scores = dot_products(queries, table, bias)(2, 9)
    torch.testing.assert_close(scores, (queries @ table.float().T + bias)[:, 2:9])


class Live(TorchDispatchMode):
    """The most bytes that were alive at once, of tensors made under it: exact, where the process's resident memory also
    has the pages of libraries that are first met, or come back after the machine was short of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for made in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if made._cdata not in given:
                self.storages[made._cdata] = (StorageWeakRef(made), made.nbytes())
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


def test_a_million_items_are_ranked_in_bounded_memory() -> None:
    torch.manual_seed(0)
    num_items, block_size = 1_000_000, 8192
    queries, table = torch.randn(64, 64), torch.randn(num_items + 1, 64)
    history, targets = torch.randint(1, num_items + 1, (64, 200)), torch.randint(1, num_items + 1, (64, 1))
    with Live() as live:
        scores = dot_products(queries, table)
        ranks, _ = rank_and_top_k(scores, num_items, 10, targets, history, block_size)
    block = 64 * block_size * 4
    assert block < live.most < 4 * block  # 1/30 of all scores
    expected = [int((table[1:] @ q >= table[t] @ q).sum()) for q, t in zip(queries[:3], targets[:3, 0], strict=True)]
    for found, value in zip(ranks[:3, 0].tolist(), expected, strict=True):
        assert abs(found - value) <= 200  # the history is not masked here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0, but must be in 1 to 23"),
        ({"k": 24}, "k is 24"),
        ({"block_size": 0}, "block_size is 0"),
        ({"history": torch.full((B, 1), 24)}, "histories have items 24 to 24"),
        ({"targets": torch.zeros(B, 1)}, "targets are torch.float32"),
        ({"targets": torch.ones(B, 0, dtype=torch.int64)}, r"shape \[6, 0\]"),
        ({"targets": torch.ones(B + 1, 1, dtype=torch.int64)}, r"shape \[7, 1\]"),
        ({"scores": torch.zeros(B - 1, N + 1)}, r"have shape \[5, 23\]"),
    ],
)
def test_bad_arguments_are_refused(change, message) -> None:
    scores, targets, history = problem(False)
    arguments = {"scores": scores, "k": 5, "targets": targets, "history": history, **change}
    with pytest.raises(ValueError, match=message):
        rank_and_top_k(block_of(arguments.pop("scores")), N, **arguments)


@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_scores_that_are_not_numbers_are_refused(value: float) -> None:
    scores, targets, history = problem(False)
    targets[3] = 0
    scores[3] = value
    with pytest.raises(ValueError, match="scores are NaN"):
        rank(block_of(scores), N, targets, history)
    with pytest.raises(ValueError, match="scores are NaN"):
        top_k(block_of(scores), N, 3, history)
    scores[0] = float("inf")
    with pytest.raises(ValueError, match="score of a target is not finite"):
        rank(block_of(scores), N, targets, history)
