"""Predicted ratings: a squared error that is what its equation says, and errors that are those of loops over the data."""

import csv
import json
import math
import random

import numpy as np
import pytest
import torch

import bigmodel
from bigmodel.cli import main
from bigmodel.nn import MatrixFactorization
from bigmodel.run import find_run
from bigmodel.tasks.recommendation import PairRecommendation, SequentialRecommendation, SquaredError
from bigmodel.tasks.recommendation.closed_form import recency_weights

TASKS = "bigmodel.tasks.recommendation"


def test_squared_error_is_the_papers_equation():
    torch.manual_seed(0)
    net, loss = MatrixFactorization(4, 6, width=3, user_bias=True, init_std=1.0), SquaredError(0.3)
    with torch.no_grad():
        net.item_bias[1:].normal_()
        net.user_bias.normal_()
    loss.mean.fill_(3.2)
    events = [(0, 5, 4.0), (3, 1, 2.5), (0, 6, 5.0), (2, 1, 1.0)]
    users, items, ratings = (torch.tensor(column) for column in zip(*events, strict=True))
    expected = 0.0
    for user, item, rating in events:
        p, q = net.embed_users.weight[user], net.embed.weight[item]
        b_user, b_item = net.user_bias[user], net.item_bias[item]
        error = rating - 3.2 - b_user - b_item - sum(p[d] * q[d] for d in range(3))
        expected = expected + error**2 + 0.3 * (sum(p**2) + sum(q**2) + b_user**2 + b_item**2)
    total, count = loss(net, users, items, ratings)
    torch.testing.assert_close(total, expected)
    assert count == 4
    parts = [loss(net, *(column[part] for column in (users, items, ratings)))[0] for part in (slice(1), slice(1, 4))]
    torch.testing.assert_close(sum(parts), total)
    plain = MatrixFactorization(4, 6, width=3, bias=False)
    assert torch.equal(SquaredError().predict(plain, users, items[:, None])[:, 0], plain(users)[torch.arange(4), items])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty users rate some of fifteen items, by how strict they are, how good these are, and a little chance."""
    folder = tmp_path_factory.mktemp("ratings")
    draw = random.Random(0)
    with open(folder / "rated.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "rating", "timestamp"])
        good = [draw.gauss(0, 1) for _ in range(15)]
        for user in range(60):
            kind = draw.gauss(3, 1)
            for t, item in enumerate(draw.sample(range(15), draw.randint(4, 10))):
                writer.writerow([user, item, round(kind + good[item] + draw.gauss(0, 0.1), 2), 1000 + t])
        writer.writerow([59, 99, 4, 2000])  # an item of this test event alone
    (folder / "experiment.yaml").write_text("trainer: {accelerator: cpu}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def measured(task, *flags):
    """Errors of a run on the test split, its task, and the data."""
    common = {
        "model": f"{TASKS}.{task}", "data": f"{TASKS}.InteractionData",
        "data.path": "rated.csv", "data.cache_dir": "cache", "data.batch_size": 32,
        "callbacks.best.monitor": "val/rmse", "callbacks.progress": "null", "model.topk": "[5]",
    }  # fmt: skip
    main(
        ["fit", "-c", "experiment.yaml", *(str(w) for k, v in common.items() for w in (f"--{k}", v)), *map(str, flags)]
    )
    main(["test", "last"])
    data = bigmodel.load_data("last")
    data.prepare_data()
    data.setup("test")
    return json.loads((find_run("last") / "test.json").read_text()), bigmodel.load("last"), data


def check(metrics, errors):
    assert metrics["test/rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-5)
    assert metrics["test/mae"] == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-5)


def split(data, name):
    """(user, item, rating) of a split."""
    numbers, events = data.parts.event_indices(name), data.parts.events
    users = np.searchsorted(events.offsets, numbers, side="right") - 1
    return list(zip(users.tolist(), events.items[numbers].tolist(), events.ratings[numbers].tolist(), strict=True))


def test_matrix_factorisation_learns_ratings_and_is_loaded_with_their_mean(folder):
    metrics, task, data = measured(
        "PairRecommendation", "--model.loss", f"{TASKS}.SquaredError", "--model.loss.l2", 0.001,
        "--model.net.user_bias", "true", "--model.net.width", 2, "--model.optimizer", "torch.optim.Adam",
        "--model.optimizer.lr", 0.03, "--trainer.max_epochs", 30,
    )  # fmt: skip
    mean = sum(rating for *_, rating in split(data, "train")) / len(split(data, "train"))
    assert task.loss.mean.item() == pytest.approx(mean, rel=1e-6)
    net, errors = task.net.requires_grad_(False), []
    for user, item, rating in split(data, "test"):
        vectors = float(net.embed_users.weight[user] @ net.embed.weight[item])
        errors.append(mean + vectors + float(net.user_bias[user] + net.item_bias[item]) - rating)
    check(metrics, errors)
    spread = np.std([rating for *_, rating in split(data, "test")])
    assert metrics["test/rmse"] < 0.4 * spread


@pytest.mark.parametrize("prediction", ["mean", "norm"])
def test_neighbours_rank_and_predict_ratings_by_those_of_the_history(folder, prediction):
    metrics, task, data = measured(
        "NonNeuralRecommendation", "--model.method", f"{TASKS}.closed_form.UserKNN",
        "--model.method.prediction", prediction, "--model.method.num_neighbors", 20,
        "--model.values", "ratings", "--model.recency_decay", 0.5,
        "--trainer.max_steps", 1, "--trainer.num_sanity_val_steps", 0,
    )  # fmt: skip
    x, history = np.zeros((60, 17)), np.zeros((60, 17))
    for user, item, rating in split(data, "train"):
        x[user, item] = history[user, item] = rating
    for user, item, rating in split(data, "val"):
        history[user, item] = rating
    errors, fallbacks = [], 0
    for user, item, rating in split(data, "test"):
        own = history[user]
        cosine = {
            other: x[other] @ own / math.sqrt((x[other] @ x[other]) * (own @ own))
            for other in range(60)
            if other != user
        }
        nearest = sorted(cosine, key=lambda other: -cosine[other])[:20]
        having = [(cosine[other], x[other, item]) for other in nearest if cosine[other] > 0 and x[other, item]]
        if not having:
            fallbacks += 1
            predicted = own.sum() / (own != 0).sum()
        elif prediction == "mean":
            predicted = sum(w * r for w, r in having) / sum(w for w, _ in having)
        else:
            predicted = sum(r for _, r in having) / math.sqrt(sum(r * r for _, r in having))
        errors.append(predicted - rating)
    check(metrics, errors)
    assert fallbacks > 0
    batch = next(iter(data.test_dataloader()))
    values = batch.history_ratings * recency_weights(batch.history, 0.5)
    scores = [task.method.score_block(batch.history, worth, batch.users)(1, 17) for worth in (values, None)]
    assert torch.equal(task.score_block(batch)(1, 17), scores[0])
    assert not torch.equal(*scores)


def test_ratings_are_asked_for_where_they_can_be(folder):
    pairs = SquaredError()
    for task, message in (
        (
            SequentialRecommendation(loss=pairs),
            "SquaredError is for pairs .*: set --model PairRecommendation",
        ),
        (
            PairRecommendation(lambda **known: torch.nn.Linear(1, 1), pairs),
            "Linear does not predict ratings: .*bigmodel.nn.Matr",
        ),
    ):
        task._sizes = {"num_items": 5, "max_length": 3, "num_users": 2}
        with pytest.raises(ValueError, match=message):
            task.configure_model()
    with pytest.raises(ValueError, match=r"--model.loss.l2 -1: must be"):
        SquaredError(-1)
    rows = (folder / "rated.csv").read_text().splitlines()
    (folder / "plain.csv").write_text("\n".join(",".join(row.split(",")[:2]) for row in rows))
    with pytest.raises(SystemExit):
        measured("PairRecommendation", "--model.loss", f"{TASKS}.SquaredError", "--data.path", "plain.csv")
