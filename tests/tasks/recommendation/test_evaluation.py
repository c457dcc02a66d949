"""What an evaluation measures, from a table of events to metrics: on one process and three, sampled and full."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bigmodel.tasks.recommendation import GlobalTime, InteractionData, evaluation
from bigmodel.tasks.recommendation.evaluation import Evaluation


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Ten users with something to evaluate in each split, twenty items, ratings."""
    path = tmp_path_factory.mktemp("ten") / "ten.csv"
    draw = torch.Generator().manual_seed(0)
    rows = []
    for user in range(10):
        for t, item in enumerate(torch.randperm(20, generator=draw)[: 10 + user % 4].tolist()):
            rows.append(f"{user},{item},{1 + (user * item) % 5},{1000 + 10 * t + user}")
    path.write_text("user_id,item_id,rating,timestamp\n" + "\n".join(rows) + "\n")
    return path


def data(path, tmp_path, rank=0, num_processes=1, batch_size=4):
    made = InteractionData(str(path), split=GlobalTime(0.2, 0.2), batch_size=batch_size, cache_dir=str(tmp_path))
    share = {"rank": rank, "num_replicas": num_processes}
    made.trainer = SimpleNamespace(distributed_sampler_kwargs=share, is_global_zero=rank == 0, lightning_module=None)
    made.setup("test")
    return made


def scores() -> Tensor:
    """[10, 21] of each user for each item; few distinct ones."""
    return torch.randint(0, 7, (10, 21), generator=torch.Generator().manual_seed(1)).float()


def measure(made, sampled=None, rated=True) -> Evaluation:
    """An evaluation that has taken in this process's share of the test users, scored and rated by a table."""
    table, measured = scores(), Evaluation((3, 5, 10, 40), sampled)
    measured.prepare(20, torch.from_numpy(made.item_counts()))
    for batch in made.test_dataloader():
        predicted = 1 + table[batch.users].gather(1, batch.targets) / 2 if rated else None
        measured.update(lambda first, last, users=batch.users: table[users, first:last], batch, predicted)
    return measured


def together(processes) -> Evaluation:
    """The first of them, which gathers the states of all as torchmetrics does it between processes."""
    metrics = [
        [one.metrics, one.sampled, *(one.errors[name] for name in ("rmse", "mae"))] for one in processes
    ]  # by process
    for same in zip(*metrics, strict=True):
        states = [{name: getattr(each, name) for name in each._defaults} for each in same]
        gathered = iter([[state[name] for state in states] for name in states[0]])
        same[0].dist_sync_fn = lambda state, group=None, gathered=gathered: next(gathered)
        same[0].distributed_available_fn = lambda: True
    return processes[0]


def test_one_process_and_three_measure_the_same_over_ten_users(path, tmp_path):
    """Statement 9. Ten users on three processes: rows that only fill up among them."""
    shares = [data(path, tmp_path, rank, 3, batch_size=6) for rank in range(3)]
    assert sum(int((batch.weight == 0).sum()) for share in shares for batch in share.test_dataloader()) > 0
    alone = measure(data(path, tmp_path), sampled=7).compute("test")
    three = together([measure(share, sampled=7) for share in shares]).compute("test")
    assert alone.keys() == three.keys()
    assert {"test/ndcg@3", "test/mrr", "test/sampled_hr@5", "test/coverage@10", "test/rmse", "test/mae"} <= alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(three[name], value, rtol=1e-6, atol=0, msg=name)


def test_errors_of_ratings_are_those_of_a_loop_over_all_targets(path, tmp_path):
    made, table, errors = data(path, tmp_path), scores(), []
    starts, stops = made.parts.bounds("test")
    for user in made.parts.users_to_evaluate("test").tolist():
        for event in range(starts[user], stops[user]):
            item = int(made.parts.events.items[event])
            errors.append(1 + float(table[user, item]) / 2 - float(made.parts.events.ratings[event]))
    measured = measure(made)
    values = measured.compute("test")
    assert values["test/rmse"].item() == pytest.approx((sum(e * e for e in errors) / len(errors)) ** 0.5, rel=1e-6)
    assert values["test/mae"].item() == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-6)
    assert not {"val/rmse", "val/mae"} & measure(made, rated=False).compute("val").keys()


def test_sampled_metrics_come_on_request_and_from_other_items(path, tmp_path, monkeypatch):
    """Statement 11; and the drawn items are neither of the history nor targets, the same in any batch and at any time."""
    assert not [name for name in measure(data(path, tmp_path)).compute("test") if "sampled" in name]
    drawn, draw = {}, evaluation.evaluation_negatives

    def watched(seed, users, num_items, num_negatives, met):
        items = draw(seed, users, num_items, num_negatives, met)
        for user, row, seen in zip(users.tolist(), items.tolist(), met.tolist(), strict=True):
            there = [item for item in row if item]
            assert len(set(there)) == len(there)
            assert not set(there) & set(seen)
            if 0 not in seen[-1:]:  # a row that is no filler
                assert drawn.setdefault(user, row) == row
        return items

    monkeypatch.setattr(evaluation, "evaluation_negatives", watched)
    made, table = data(path, tmp_path), scores()
    sampled = measure(made, sampled=4)
    values = sampled.compute("test")
    assert measure(data(path, tmp_path, batch_size=7), sampled=4).compute("test") == values
    assert {name for name in values if "sampled" in name} == {
        f"test/sampled_{name}" for name in ("mrr", *(f"{m}@3" for m in ("hr", "recall", "precision", "ndcg", "mrr")))
    }, "a list of 5, 10 or 40 would hold the target always"
    hits = []
    for batch in made.test_dataloader():
        for user, targets, weight in zip(batch.users.tolist(), batch.targets, batch.weight, strict=True):
            mine = [int(t) for t in targets if t]
            best = min(1 + sum(float(table[user, j]) >= float(table[user, t]) for j in drawn[user] if j) for t in mine)
            hits += [best <= 3] * bool(weight)
    assert values["test/sampled_hr@3"].item() == pytest.approx(sum(hits) / len(hits))


def test_samples_that_are_none_are_refused():
    for number, message in (
        (0, "num_eval_negatives 0: must be at least 1"),
        (20, "num_eval_negatives 20: must be below the number of items, 20"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation((5,), number).prepare(20, None)
