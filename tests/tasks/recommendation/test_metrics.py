"""Metrics against constants, a loop over lists, torchmetrics, and themselves over several processes."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import retrieval

from bigmodel.tasks.recommendation.metrics import RankingMetrics
from bigmodel.tasks.recommendation.ranking import rank_and_top_k

N = 40


def evaluation(num_users: int, num_targets: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, N + 1], targets [B, K], of which users have one to K, and training events of the items."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_users, N + 1, generator=generator)
    targets = torch.stack([torch.randperm(N, generator=generator)[:num_targets] + 1 for _ in range(num_users)])
    wanted = torch.randint(1, num_targets + 1, (num_users, 1), generator=generator)
    targets[torch.arange(num_targets) >= wanted] = 0
    return scores, targets, torch.randint(100, (N + 1,), generator=generator)


def lists(scores: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    history = torch.zeros(len(scores), 1, dtype=torch.int64)
    return rank_and_top_k(lambda first, last: scores[:, first:last], N, k, targets, history)


def test_constants_of_one_target() -> None:
    for rank, ndcg in ((1, 1), (2, 0.6309297536), (10, 0.2890648263), (11, 0)):
        metrics = RankingMetrics([10])
        metrics.update(torch.tensor([[rank]]))
        values = metrics.compute()
        assert values["ndcg@10"].item() == pytest.approx(ndcg, abs=1e-7)
        assert values["hr@10"] == values["recall@10"] == (rank <= 10)
        assert values["precision@10"].item() == pytest.approx((rank <= 10) / 10)
        assert values["mrr"].item() == pytest.approx(1 / rank)
        assert values["mrr@10"].item() == pytest.approx(1 / rank if rank <= 10 else 0)


def test_against_a_loop_over_lists() -> None:
    scores, targets, counts = evaluation(50, 15)
    metrics = RankingMetrics([1, 5, 20], counts)
    ranks, items = lists(scores, targets, 20)
    ranks[7] = 0  # a user without targets counts for nothing
    metrics.update(ranks[:20], items[:20])
    metrics.update(ranks[20:], items[20:])
    values = {name: value.item() for name, value in metrics.compute().items()}
    users = [u for u in range(50) if u != 7]
    wanted = [set(targets[u].tolist()) - {0} for u in range(50)]
    order = [scores[u, 1:].argsort(descending=True).add(1).tolist() for u in range(50)]

    def mean(of_user) -> float:
        return sum(of_user(u) for u in users) / len(users)

    def first(u: int) -> int:
        return next(r for r, i in enumerate(order[u], 1) if i in wanted[u])

    def ndcg(u: int, k: int) -> float:
        gains = sum(1 / math.log2(r + 1) for r, i in enumerate(order[u][:k], 1) if i in wanted[u])
        return gains / sum(1 / math.log2(r + 1) for r in range(1, min(k, len(wanted[u])) + 1))

    expected = {"mrr": mean(lambda u: 1 / first(u))}
    for k in (1, 5, 20):
        hits = [len(wanted[u] & set(order[u][:k])) for u in range(50)]
        expected |= {
            f"hr@{k}": mean(lambda u, hits=hits: hits[u] > 0),
            f"recall@{k}": mean(lambda u, hits=hits: hits[u] / len(wanted[u])),
            f"precision@{k}": mean(lambda u, k=k, hits=hits: hits[u] / k),
            f"ndcg@{k}": mean(lambda u, k=k: ndcg(u, k)),
            f"mrr@{k}": mean(lambda u, k=k: (first(u) <= k) / first(u)),
            f"coverage@{k}": len({i for u in users for i in order[u][:k]}) / N,
            f"popularity@{k}": mean(lambda u, k=k: sum(int(counts[i]) for i in order[u][:k]) / k),
        }
    assert values == pytest.approx(expected, rel=1e-6)


def test_against_torchmetrics() -> None:
    scores, targets, _ = evaluation(60, 9, seed=1)
    metrics = RankingMetrics([3, 10])
    metrics.update(lists(scores, targets, 1)[0])
    values = metrics.compute()
    relevant = torch.zeros(60, N + 1, dtype=torch.bool).scatter_(1, targets, True)[:, 1:]
    users = torch.arange(60)[:, None].expand(-1, N)
    theirs = {"mrr": retrieval.RetrievalMRR()}
    for k in (3, 10):
        theirs |= {
            f"ndcg@{k}": retrieval.RetrievalNormalizedDCG(top_k=k),
            f"recall@{k}": retrieval.RetrievalRecall(top_k=k),
            f"precision@{k}": retrieval.RetrievalPrecision(top_k=k),
            f"hr@{k}": retrieval.RetrievalHitRate(top_k=k),
            f"mrr@{k}": retrieval.RetrievalMRR(top_k=k),
        }
    positive = scores[:, 1:].sigmoid()  # their reciprocal rank takes what is not above 0 as not retrieved
    for name, metric in theirs.items():
        torch.testing.assert_close(values[name], metric(positive.flatten(), relevant.flatten(), users.flatten()))
    assert set(theirs) == set(values)


@pytest.mark.parametrize("num_targets", [1, 6])
def test_one_process_and_three_measure_the_same_over_ten_users(num_targets: int) -> None:
    scores, targets, counts = evaluation(10, num_targets, seed=2)
    ranks, items = lists(scores, targets, 10)
    alone = RankingMetrics([5, 10], counts)
    nn.ModuleList([alone]).to(torch.bfloat16)  # as a task is, whose parameters are
    alone.update(ranks, items)
    processes = [RankingMetrics([5, 10], counts) for _ in range(3)]
    for metrics, users in zip(processes, (slice(0, 4), slice(4, 8), slice(8, 10)), strict=True):
        metrics.update(ranks[users], items[users])
    states = [{name: getattr(metrics, name) for name in metrics._defaults} for metrics in processes]

    # Gathering as torchmetrics does it between processes, with these states instead of those that arrive.
    gathered = iter([[state[name] for state in states] for name in states[0]])
    together = processes[0]
    together.dist_sync_fn = lambda state, group=None: next(gathered)
    together.distributed_available_fn = lambda: True
    torch.testing.assert_close(together.compute(), alone.compute(), rtol=0, atol=0)
    assert together.compute().keys() == alone.compute().keys()


def test_sampled_metrics_say_so() -> None:
    metrics = RankingMetrics([2], prefix="sampled_")
    metrics.update(torch.tensor([[2]]))
    assert all(name.startswith("sampled_") for name in metrics.compute())
    metrics.reset()
    metrics.update(torch.tensor([[0]]))
    with pytest.raises(ValueError, match="no user with a target"):
        metrics.compute()


def test_bad_arguments_are_refused() -> None:
    for topk in ([], [0], [5, 5]):
        with pytest.raises(ValueError, match=r"--model\.topk"):
            RankingMetrics(topk)
    counts = torch.ones(N + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"lists have shape None, but .* at 10 need"):
        RankingMetrics([10], counts).update(torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[3, 9\]"):
        RankingMetrics([10], counts).update(torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ranks have shape \[3\]"):
        RankingMetrics([10]).update(torch.ones(3, dtype=torch.int64))
