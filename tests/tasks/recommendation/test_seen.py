"""Targets that repeat: counted once, and by one rule in evaluation, `predict` and `recommend`."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bigmodel.tasks.recommendation import GlobalTime, InteractionData, NonNeuralRecommendation
from bigmodel.tasks.recommendation.closed_form import Popularity
from bigmodel.tasks.recommendation.evaluation import Evaluation, repeats
from bigmodel.tasks.recommendation.metrics import RankingMetrics
from bigmodel.tasks.recommendation.ranking import rank

CASES = Path(__file__).parent / "cases"
TOPK = (1, 5, 10, 40)


def data(path, tmp_path, split=None):
    made = InteractionData(str(path), split=split, batch_size=7, cache_dir=str(tmp_path))
    made.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"rank": 0, "num_replicas": 1}, is_global_zero=True, lightning_module=None
    )
    made.setup("test")
    return made


def brute_force(made, table, seen):
    """Means over users, by loops over sets of items; and the lists."""
    totals, lists, num_users = {}, {}, 0
    events, (starts, stops) = made.parts.events, made.parts.bounds("test")
    for user in made.parts.users_to_evaluate("test").tolist():
        history = set(events.items[events.offsets[user] : starts[user]].tolist())
        targets = set(events.items[starts[user] : stops[user]].tolist())
        allowed = set(range(1, events.num_items + 1)) - (set() if seen == "keep" else history)
        lists[user] = sorted(allowed, key=lambda item: (-float(table[user, item]), item))
        if seen == "drop_targets":
            targets -= history
        if not targets:
            continue
        num_users += 1
        # Ties count against a target: other items first, then the targets in any order.
        order = sorted(allowed | (targets - history), key=lambda item: (-float(table[user, item]), item in targets))
        ranks = [order.index(item) + 1 for item in order if item in targets]
        for name, value in [("mrr", 1 / ranks[0] if ranks else 0.0)] + [
            (f"{name}@{k}", value)
            for k in TOPK
            for name, value in (
                ("hr", float(any(r <= k for r in ranks))),
                ("recall", sum(r <= k for r in ranks) / len(targets)),
                ("precision", sum(r <= k for r in ranks) / k),
                (
                    "ndcg",
                    sum(1 / math.log2(r + 1) for r in ranks if r <= k)
                    / sum(1 / math.log2(i + 1) for i in range(1, min(k, len(targets)) + 1)),
                ),
            )
        ]:
            totals[name] = totals.get(name, 0.0) + value
    return {name: value / num_users for name, value in totals.items()}, lists


@pytest.mark.parametrize(
    ("name", "seen"),
    [(name, seen) for name in ("repeats_in_test", "repeat_consumption") for seen in ("mask", "keep", "drop_targets")][
        :-1
    ],
)
def test_metrics_and_lists_follow_one_rule_as_in_a_loop(name, seen, tmp_path, capsys):
    split = GlobalTime("1970-01-01T01:23:20", "1970-01-01T02:30:00") if name == "repeats_in_test" else None
    made = data(CASES / f"{name}.csv", tmp_path, split)
    num_users, num_items = made.prepared.events.num_users, made.prepared.events.num_items
    table = torch.randint(0, 9, (num_users, num_items + 1), generator=torch.Generator().manual_seed(0)).float()
    evaluation = Evaluation(TOPK, 5, seen)
    evaluation.prepare(num_items, torch.from_numpy(made.item_counts()))
    task = NonNeuralRecommendation(seen=seen)
    task.score_block = lambda batch: lambda first, last: table[batch.users, first:last]
    task._trainer = SimpleNamespace(datamodule=made)
    expected, lists = brute_force(made, table, seen)
    for batch in made.test_dataloader():
        evaluation.update(lambda first, last, users=batch.users: table[users, first:last], batch)
        if batch.weight[0]:
            listed = task._item_catalog().prediction_table(
                task.score_block(batch), batch, 10, task.evaluation.excluded(batch)
            )
            users, item_ids = made.prepared.users.numbers(listed["user"].to_pylist()), listed["items"].to_pylist()
            for user, ids in zip(users.tolist(), item_ids, strict=True):
                assert made.prepared.items.numbers(ids).tolist() == lists[user][:10]
    values = evaluation.compute("test")
    for metric, value in expected.items():
        assert values[f"test/{metric}"].item() == pytest.approx(value, rel=1e-5), metric
    assert all(value <= 1 + 1e-6 for metric, value in values.items() if "sampled" in metric)
    made.report_repeats(seen)
    assert f"--model.seen {seen}" in capsys.readouterr().err


def test_a_repeated_target_counts_once(tmp_path):
    made = data(CASES / "repeats_in_test.csv", tmp_path, GlobalTime("1970-01-01T01:23:20", "1970-01-01T02:30:00"))
    matrix = made.train_matrix()
    method = Popularity().fit(matrix.indptr, matrix.indices, None, made.prepared.events.num_items)
    num_items, metrics = made.prepared.events.num_items, RankingMetrics((5, 10))
    for batch in made.test_dataloader():
        targets = batch.targets * (batch.weight > 0)[:, None]
        targets = targets.masked_fill(repeats(targets), 0)
        metrics.update(rank(method.score_block(batch.history), num_items, targets, batch.history))
    values = {name: round(value.item(), 3) for name, value in metrics.compute().items()}
    assert [values[name] for name in ("mrr", "hr@5", "precision@5", "ndcg@10")] == [
        0.637,
        0.675,
        0.135,
        0.664,
    ]


def test_targets_that_are_all_dropped_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="drop_targets leaves no target in"):
        data(CASES / "repeat_consumption.csv", tmp_path).report_repeats("drop_targets")


def test_cutoffs_above_the_number_of_items_are_measured_and_printed(capsys):
    evaluation = Evaluation((2, 10))
    evaluation.prepare(3, torch.tensor([0, 1, 1, 1]))
    assert "--model.topk 10: above the number of items, 3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be one of mask, keep, drop_targets"):
        Evaluation((2,), seen="all")
