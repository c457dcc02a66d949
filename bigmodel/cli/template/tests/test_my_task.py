"""A short run learns, and what it learned can be used with no data present."""

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


def test_no_piece_is_in_both_splits():
    data = MyTaskData(["asyncio", "email"], length=128, batch_size=8)
    data.setup("fit")
    train, val = ({bytes(piece.text.tolist()) for piece in split} for split in (data.train, data.val))
    assert train
    assert val
    assert len(train & val) < 0.01 * len(val), "but for a licence or two that stand in several files"


def test_the_files_are_where_the_package_says():
    assert Path(str(files("my_task") / "experiment.yaml")).is_file()
