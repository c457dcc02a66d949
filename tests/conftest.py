"""Shared by all tests: one thread, so that sums come out bitwise alike; no tracking, unless a test asks for it; a cache
of their own, which starts empty."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("BIGMODEL_RENDEZVOUS_SECONDS", "200")  # on a busy machine a process takes long to start

import csv
import gc
import random
import tempfile
from pathlib import Path

import pytest
import torch

from bigmodel.cli import main
from bigmodel.training import precision

pytest_plugins = ["suite"]
# `trainer.precision auto` chooses float32 in the tests' own processes, and in those of `forked`, on any machine.
precision.bf16_speed = lambda shape: 1.0
OUTSIDER = Path(__file__).parent / "outsider" / "experiment.yaml"


def pytest_configure(config):
    """One cache for all processes of the suite, which inherit the variable."""
    if not hasattr(config, "workerinput"):
        cache = tempfile.TemporaryDirectory(prefix="bigmodel-cache-", ignore_cleanup_errors=True)
        config.add_cleanup(cache.cleanup)
        os.environ["BIGMODEL_CACHE"] = cache.name


def pytest_collection_finish():
    """What has been imported stays: left to the garbage collector, it is walked through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _alone():
    """A run of one process that shards its net, or asks to, leaves a process group behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory):
    """A folder of 400 small PNG files in ten classes: unlike `{digits}`, they are checked once, not by each process."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits") / "digits"
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images[:400], digits.target, strict=False)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype("uint8")).save(path)
    return folder


@pytest.fixture
def bm(request, tmp_path, monkeypatch, table, capsys):
    """Type `bigmodel ...` in an empty folder; returns what it prints, both streams, or the message it fails with.

    A fit is that of the outsider's experiment, with the module's FIT_FLAGS.
    """
    monkeypatch.chdir(tmp_path)
    flags = ["-c", str(OUTSIDER), "--data.path", str(table), "--trainer.accelerator", "cpu"]
    flags += getattr(request.module, "FIT_FLAGS", [])

    def run(*words, fails=False):
        argv = [str(word) for word in words]
        if argv[0] == "fit" and "--resume" not in argv:
            argv[1:1] = flags
        capsys.readouterr()
        if not fails:
            main(argv)
            return "".join(capsys.readouterr())
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    run.flags = flags
    return run
