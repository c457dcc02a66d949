"""The tasks of recommendation: they learn, agree with what they promise, and are used with no data present."""

import csv
import json
import random
import re
import shutil

import pyarrow.parquet as pq
import pytest
import torch

import bigmodel
from bigmodel.cli import main
from bigmodel.cli.formatting import find_differences
from bigmodel.run import checkpoint_step, find_run
from bigmodel.tasks.recommendation import InteractionData
from bigmodel.tasks.recommendation.batches import SequenceBatch
from bigmodel.tasks.recommendation.module import SequentialRecommendation

TASK = "bigmodel.tasks.recommendation.SequentialRecommendation"
PAIRS = "bigmodel.tasks.recommendation.PairRecommendation"
FITTED = "bigmodel.tasks.recommendation.NonNeuralRecommendation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eighty users who walk round a ring of twelve items from where they are: the next item is certain, and new."""
    folder = tmp_path_factory.mktemp("recommendation")
    draw = random.Random(0)
    with open(folder / "ring.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp", "rating"])
        for user in range(80):
            start = draw.randrange(12)
            for t in range(draw.randint(5, 9)):
                writer.writerow([f"u{user}", f"item {(start + t) % 12}", 1_000_000_000 + 100 * t + user, 1 + t % 5])
    (folder / "experiment.yaml").write_text("trainer: {accelerator: cpu, max_epochs: 12}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def words(task, *flags):
    common = {
        "model": task, "data": "bigmodel.tasks.recommendation.InteractionData", "data.path": "ring.csv",
        "data.max_length": 8, "data.batch_size": 16, "data.cache_dir": "cache", "callbacks.best.monitor": "val/ndcg@5",
        "callbacks.best.mode": "max", "callbacks.progress": "null", "model.topk": "[1, 5]",
    }  # fmt: skip
    given = (str(word) for key, value in common.items() for word in (f"--{key}", value))
    return ["fit", "-c", "experiment.yaml", *given, *map(str, flags)]


def measured():
    main(["test", "last"])
    return json.loads((find_run("last") / "test.json").read_text())


def trained(task, *flags):
    main(words(task, "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.01, *flags))
    return measured()


@pytest.mark.parametrize(
    "flags",
    [
        ("--model.net", "bigmodel.nn.SASRec"),
        ("--model.net", "bigmodel.nn.SASRec", "--model.loss", "bigmodel.tasks.recommendation.SampledSoftmax",
         "--model.loss.num_negatives", 8),
        ("--model.net", "bigmodel.nn.BERT4Rec", "--model.optimizer.lr", 0.003, "--trainer.max_epochs", 25),
        ("--model.net", "bigmodel.nn.GRU4Rec"),
        ("--model.net", "bigmodel.nn.HSTU"),
        ("--model.net", "bigmodel.nn.TwoTower", "--model.net.recency_decay", 0.1),
    ],
    ids=["SASRec", "SASRec, sampled", "BERT4Rec", "GRU4Rec", "HSTU", "TwoTower"],
)  # fmt: skip
def test_a_net_of_sequences_finds_the_certain_next_item(folder, flags):
    metrics = trained(TASK, "--model.net.width", 32, *flags)
    assert metrics["test/ndcg@1"] > 0.9
    assert metrics["test/hr@1"] == metrics["test/ndcg@1"]
    assert metrics["test/coverage@5"] == 1


def test_users_vectors_learn_who_goes_where(folder):
    metrics = trained(PAIRS, "--model.net.width", 16, "--data.batch_size", 64)
    assert metrics["test/hr@5"] > 5 / 8, "better than chance among the items that a user has not had"


@pytest.mark.parametrize("method", ["Popularity", "UserKNN", "ItemKNN", "EASE"])
def test_what_is_fitted_is_saved_and_measured_the_same(folder, method):
    one_step = ("--trainer.max_epochs", "null", "--trainer.max_steps", 1, "--trainer.num_sanity_val_steps", 0)
    main(words(FITTED, *one_step, "--model.method", f"bigmodel.tasks.recommendation.closed_form.{method}"))
    metrics = measured()
    task, data = bigmodel.load("last"), bigmodel.load_data("last")
    data.prepare_data()
    data.setup("test")
    matrix = data.train_matrix()
    again = type(task.method)().fit(matrix.indptr, matrix.indices, None, data.sizes["num_items"])
    batch = next(iter(data.test_dataloader()))
    saved, fitted = (m.score_block(batch.history, None, batch.users)(1, 13) for m in (task.method, again))
    torch.testing.assert_close(saved, fitted)
    assert 0 <= metrics["test/ndcg@5"] <= 1
    assert set(metrics) > {"test/mrr", "test/precision@1", "test/popularity@5"}


def test_a_trained_run_recommends_to_known_and_unknown_people(folder, capsys):
    trained(TASK, "--model.net.width", 32)
    task = bigmodel.load("last")
    (first, *others) = task.recommend(["item 3", "item 4", "item 5"], k=4)
    assert first["item"] == "item 6"
    assert first["title"] is None
    assert len({entry["item"] for entry in others} | {"item 3", "item 4", "item 5", "item 6"}) == 7, "none again"
    capsys.readouterr()
    main(["recommend", "last", "--history", "item 3,item 4,item 5", "--k", "1"])
    assert "item 6" in capsys.readouterr().out
    main(["recommend", "last", "--user", "u7", "--k", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    for flags, problem in (
        (["--user", "nobody"], "no user 'nobody'.*similar: 'u0', 'u1'.*--history"),
        (["--history", "item 99"], "no item 'item 99' among the 12 items; similar: 'item 6', .*'item 9'"),
        (["--history", "item 3", "--k", "13"], "--k 13: must be in 1 to 12"),
        (["--k", "3"], "--user ID or --history"),
        (["--user", "u1", "--size", "3"], "unknown flag --size"),
    ):
        with pytest.raises(SystemExit):
            main(["recommend", "last", *flags])
        assert re.search(problem, capsys.readouterr().err), flags


def test_a_net_that_reads_times_takes_those_of_a_history_or_says_which_it_takes(folder, capsys):
    main(words(TASK, "--model.net", "bigmodel.nn.HSTU", "--model.net.width", 8, "--trainer.max_epochs", 1))
    task, history = bigmodel.load("last"), ["item 3", "item 4", "item 5"]
    assert task.median_gap == 100, "the ring's events lie so far apart"
    capsys.readouterr()
    default = task.recommend(history, 4)
    assert "HSTU reads times: without --times, items are assumed to be 100 s apart" in capsys.readouterr().err
    assert default == task.recommend(history, 4, [1_500_000_000 + 100 * t for t in range(3)])
    assert default != task.recommend(history, 4, [1_500_000_000] * 3)
    capsys.readouterr()
    shown = []
    for times in ("1500000000,1500086400,1500086401", "2017-07-14T02:40,2017-07-15T04:40+02:00,2017-07-15T02:40:01Z"):
        main(["recommend", "last", "--history", ",".join(history), "--times", times])
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert "without --times" not in shown[0].err
    for flags, problem in (
        (["--history", "item 3", "--times", "5,6"], "2 times for a history of 1 items"),
        (["--history", "item 3,item 4", "--times", "6,5"], "time 5 is after 6"),
        (["--history", "item 3", "--times", "1500000000000"], "whole seconds since 1970"),
        (["--history", "item 3", "--times", "soon"], "--times soon"),
        (["--user", "u1", "--times", "5"], "--times needs --history"),
    ):
        with pytest.raises(SystemExit):
            main(["recommend", "last", *flags])
        assert problem in capsys.readouterr().err


def test_predictions_are_a_list_for_each_user(folder):
    trained(TASK, "--model.net.width", 32)
    main(["predict", "last", "--output", "lists.parquet"])
    rows = pq.read_table("lists.parquet").to_pylist()
    assert {row["user"] for row in rows} == {f"u{number}" for number in range(80)}
    data = InteractionData("ring.csv", cache_dir="cache")
    data.prepare_data()
    data.setup("fit")
    events = data.prepared.events
    for row in rows:
        user = int(data.prepared.users.numbers([row["user"]])[0])
        had = set(data.prepared.items.ids(events.items[events.offsets[user] : events.offsets[user + 1]]))
        assert not had & set(row["items"])
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["items"]) == min(5, 12 - len(had))


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        (TASK, ("--model.net.dropout", 0.2, "--model.loss", "bigmodel.tasks.recommendation.SampledSoftmax")),
        (TASK, ("--model.net", "bigmodel.nn.BERT4Rec", "--model.net.dropout", 0.2)),
        (PAIRS, ("--model.loss", "bigmodel.tasks.recommendation.BPR")),
        (PAIRS, ("--model.loss", "bigmodel.tasks.recommendation.SquaredError", "--model.net.user_bias", "true")),
    ],
    ids=["SASRec, sampled", "BERT4Rec", "BPR", "SquaredError"],
)
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_one_left_alone(folder, task, flags):
    """Statement 23, bitwise: dropout, masks, negatives, accumulation and metrics included. An epoch has five steps."""
    few = ("--trainer.max_epochs", "null", "--trainer.max_steps", 9, "--trainer.val_check_interval", 4)
    few += ("--trainer.check_val_every_n_epoch", "null", "--data.micro_batch_size", 4, "--model.net.width", 8)
    every = (
        "--callbacks.last.every_n_steps",
        1,
        "--callbacks.last.every_n_minutes",
        "null",
        "--callbacks.last.save_top_k",
        -1,
    )
    main(words(task, *few, *every, *flags))
    straight = find_run("last")
    stopped = straight.with_name(straight.name + "-stopped")
    shutil.copytree(straight, stopped)
    for path in (stopped / "checkpoints").glob("last-*.ckpt"):
        if checkpoint_step(path) > 7:
            path.unlink()
    main(["fit", "--resume", str(stopped)])
    ends, measured = [], []
    for directory in (straight, stopped):
        content = torch.load(directory / "checkpoints" / "last-9.ckpt", weights_only=True)
        ends.append({key: content[key] for key in ("state_dict", "optimizer_states", "global_step")})
        with open(directory / "metrics.csv", newline="") as file:
            rows = [{k: v for k, v in row.items() if "speed" not in k and v} for row in csv.DictReader(file)]
            measured.append([row for row in rows if any(name.startswith("val/") for name in row)])
    assert not find_differences(*ends)
    assert measured[0] == measured[1]
    assert measured[0]


def test_no_metric_of_the_test_split_can_select_a_model(folder, capsys):
    """Statement 8: while a net is trained there are none."""
    with pytest.raises(SystemExit):
        main(words(TASK, "--trainer.max_epochs", 1, "--callbacks.best.monitor", "test/ndcg@5"))
    assert "--callbacks.NAME.monitor test/ndcg@5" in capsys.readouterr().err


def test_masks_of_a_cloze_depend_on_the_sample_alone_and_hide_its_target(folder):
    task = SequentialRecommendation(net=lambda **known: None, mask_ratio=0.5, mask_last_ratio=0.25)
    task.net = type("Net", (), {"mask_item": 99})()
    items = torch.randint(1, 50, (400, 8))
    items[:, :3] = 0
    targets = torch.cat([items[:, 1:], torch.randint(1, 50, (400, 1))], 1) * (items > 0)
    key = torch.arange(400) * 7919
    batch = SequenceBatch(items, targets, None, key, key, torch.ones(400), key)
    read, hidden = task._windows(batch)
    whole = torch.cat([items[:, 1:], targets[:, -1:]], 1)
    assert torch.equal(torch.where(hidden > 0, hidden, read), whole)
    assert torch.equal(hidden > 0, read == 99)
    assert (hidden > 0).any(1).all(), "each window predicts something"
    only_last = ((hidden > 0).sum(1) == 1) & (hidden[:, -1] > 0)
    assert 0.2 < only_last.float().mean() < 0.4
    some = torch.tensor([5, 17])
    part = task._windows(SequenceBatch(*(None if x is None else x[some] for x in batch)))
    assert torch.equal(part[0], read[some])
