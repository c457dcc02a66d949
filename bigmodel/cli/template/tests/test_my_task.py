"""A short run learns, and its result is loaded without data."""

from importlib.resources import files
from pathlib import Path

import torch

import bigmodel
from bigmodel.cli import main
from my_task.data import MyTaskData


def test_a_short_run_is_better_than_chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    experiment = str(files("my_task") / "experiment.yaml")
    main(["fit", "-c", experiment, "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"])
    task = bigmodel.load("last")
    code = b"async def main():\n    loop = asyncio.get_running_loop()\n    await loop.create_task(work())\n"
    assert task.net(torch.tensor([list(code)])).argmax() == 0, "asyncio"


def test_no_chunk_is_in_both_splits():
    data = MyTaskData(["asyncio", "email"], length=128, batch_size=8)
    data.setup("fit")
    train, val = ({bytes(chunk.text.tolist()) for chunk in split} for split in (data.train, data.val))
    assert train
    assert val
    assert len(train & val) < 0.01 * len(val), "except for a licence that several files contain"


def test_the_experiment_is_in_the_package():
    assert Path(str(files("my_task") / "experiment.yaml")).is_file()
