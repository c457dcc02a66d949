"""A line before the disk is full, with both numbers, and none where there is room; of a full one no run is left."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from bigmodel.cli import main
from bigmodel.run import run_directory
from bigmodel.training.callbacks.disk import _bytes


@pytest.mark.parametrize("free", [0, 10**12])
def test_a_disk_without_room_for_the_next_checkpoints_is_told_of(table, tmp_path, monkeypatch, capsys, free):
    monkeypatch.chdir(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    experiment = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")
    main(
        [
            "fit",
            "-c",
            experiment,
            "--data.path",
            str(table),
            "--trainer.accelerator",
            "cpu",
            "--model.net.width",
            "100000",
        ]
    )
    out = capsys.readouterr().out
    # Four numbers in float32 for each of the net's units and one more: 1.6 MB, three times, for best and last each.
    if free:
        assert "warning: " not in out
    else:
        told = [line for line in out.splitlines() if line.startswith("warning: ")]
        assert len(told) >= 3, "before training, at the best, and at the last"
        assert all("0.00 GB are free in " in line and "the next checkpoints need 0.01 GB" in line for line in told)


def test_what_a_checkpoint_takes():
    assert _bytes({"a": torch.zeros(10), "b": [torch.zeros(2, dtype=torch.int64), {"c": (1.0, "text", None)}]}) == 56


def test_a_run_that_a_full_disk_does_not_take_leaves_no_directory(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_directory.os, "replace", full)
    experiment = str(Path(__file__).parents[1] / "outsider" / "experiment.yaml")
    with pytest.raises(SystemExit):
        main(["fit", "-c", experiment, "--data.path", str(table), "--trainer.accelerator", "cpu"])
    error = capsys.readouterr().err
    assert "(No space left on device): free space there, or set --runs_dir to another folder" in error
    assert not list(tmp_path.glob("runs/*/*"))
