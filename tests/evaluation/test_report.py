"""The list of mistakes holds the worst, with their text, whatever kind of answer was asked for; an empty one goes."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bigmodel.evaluation import Report
from bigmodel.run import RunDirectory

TEXTS = ["good, cheap", 'a "bad"\nline', "fair", "odd", "plain"]


class Data:
    classes: list[str] = ["bad", "fair", "good"]  # noqa: RUF012

    def texts(self, split):
        assert split == "test"
        return TEXTS


def rows_of(folder, *batches, confusion=None, **options):
    """What a report on these steps' outputs lists; None: nothing."""
    record = RunDirectory({}, folder)
    trainer = SimpleNamespace(
        callbacks=[record], datamodule=Data(), loggers=[], is_global_zero=True, sanity_checking=False, world_size=1
    )
    task = SimpleNamespace(trainer=trainer, metrics=SimpleNamespace(confusion=lambda: confusion))
    report = Report(**options)
    report.on_test_start(trainer, task)
    for number, batch in enumerate(batches):
        report.on_test_batch_end(trainer, task, {k: torch.tensor(v) for k, v in batch.items()}, None, number)
    report.on_test_epoch_end(trainer, task)
    report.on_test_end(trainer, task)
    path = folder / "test_mistakes.csv"
    if not path.exists():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_one_class_each_the_worst_first(tmp_path):
    batches = [
        {"index": [0, 1], "loss": [0.1, 1.5], "target": [2, 0], "predicted": [2, 2], "probability": [0.9, 0.7]},
        {"index": [2, 3, 4], "loss": [2.5, 3.5, 0.7], "target": [1, 1, 1], "predicted": [0, 2, 0],
         "probability": [0.8, 0.9, 0.4]},
    ]  # fmt: skip
    confusion = torch.tensor([[0, 0, 1], [2, 0, 1], [0, 0, 1]])
    rows = rows_of(tmp_path, *batches, confusion=confusion, num_mistakes=3)
    assert rows == [
        ["text", "true", "predicted", "probability", "loss"],
        ["odd", "fair", "good", "0.9000", "3.5"],
        ["fair", "fair", "bad", "0.8000", "2.5"],
        ['a "bad"\nline', "bad", "good", "0.7000", "1.5"],
    ]
    assert (tmp_path / "test_confusion.png").exists()
    right = {"index": [0], "loss": [0.1], "target": [2], "predicted": [2], "probability": [0.9]}
    assert rows_of(tmp_path, right, confusion=confusion) is None, "that of an earlier evaluation"


def test_several_labels_are_named(tmp_path):
    batch = {
        "index": [4, 3], "loss": [0.5, 0.2], "target": [[1, 0, 1], [0, 1, 0]], "predicted": [[0, 1, 1], [0, 1, 0]],
        "probability": [[0.2, 0.6, 0.75], [0.1, 0.9, 0.1]],
    }  # fmt: skip
    assert rows_of(tmp_path, batch)[1:] == [["plain", "bad; good", "fair; good", "0.6000; 0.7500", "0.5"]]
    assert not (tmp_path / "test_confusion.png").exists()


def test_numbers_are_listed_by_their_error(tmp_path):
    errors = np.array([0.5, 0.0, -2.0])
    batch = {
        "index": [2, 0, 1],
        "loss": errors**2,
        "target": [1.0, 2.0, 3.0],
        "predicted": errors + np.arange(1.0, 4.0),
    }
    assert rows_of(tmp_path, batch) == [
        ["text", "true", "predicted", "loss"],
        ['a "bad"\nline', "3", "1", "4"],
        ["fair", "1", "1.5", "0.25"],
    ]


@pytest.mark.parametrize("num_mistakes", [None, 7])
def test_more_texts_are_listed_than_images_drawn(num_mistakes, tmp_path, monkeypatch):
    monkeypatch.setattr(Data, "texts", lambda self, split: [str(i) for i in range(300)])
    batch = {"index": range(300), "loss": np.arange(300.0), "target": [0] * 300, "predicted": [1] * 300}
    rows = rows_of(tmp_path, {**batch, "probability": [0.5] * 300}, num_mistakes=num_mistakes)
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(299, 299 - (num_mistakes or 200), -1)]
