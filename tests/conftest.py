"""Shared by all tests: one thread, so that sums come out bitwise alike; no tracking, unless a test asks for it."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")

import csv
import random
from pathlib import Path

import pytest
import torch

from bigmodel.cli import main


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A CSV file of 100 rows, y = a b: 80 for training, 20 for validation."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    draw = random.Random(0)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "y"])
        for _ in range(100):
            a, b = draw.random(), draw.random()
            writer.writerow([a, b, a * b])
    return path


@pytest.fixture
def bm(tmp_path, monkeypatch, table, capsys, request):
    """Type `bigmodel ...` in an empty folder, `fit` with the outsider's task and the flags of the module's FIT, if there is
    such a list; returns what is printed, both streams, or the message it fails with."""
    monkeypatch.chdir(tmp_path)
    experiment = Path(__file__).parent / "outsider" / "experiment.yaml"
    flags = ["-c", str(experiment), "--data.path", str(table), "--trainer.accelerator", "cpu"]

    def run(*words, fails=False):
        argv = [str(word) for word in words]
        if argv[0] == "fit" and "--resume" not in argv:
            argv[1:1] = [*flags, *getattr(request.module, "FIT", [])]
        capsys.readouterr()
        if not fails:
            main(argv)
            return "".join(capsys.readouterr())
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run
