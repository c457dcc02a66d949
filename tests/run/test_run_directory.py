"""A run directory stays right: a resume that fails changes nothing, a damaged file is named and written anew."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from bigmodel.checkpoint import archive, find_checkpoint
from bigmodel.cli import main
from bigmodel.run import record as records

FIT_FLAGS = ["--trainer.max_steps", "4", "--trainer.max_epochs", "null", "--callbacks.last.every_n_steps", "2",
             "--callbacks.last.every_n_minutes", "null", "--trainer.log_every_n_steps", "1"]  # fmt: skip


@pytest.fixture
def run(bm):
    bm("fit")
    (run,) = Path("runs").glob("*/*")
    return run


def snapshot(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def record(run):
    return json.loads((run / "run.json").read_text())


AVERAGE = "bigmodel.training.callbacks.SWA"


@pytest.mark.parametrize(
    "change",
    [
        ["--model.optimizer", "torch.optim.RMSprop"],  # its first step fails with the state of AdamW
        ["--callbacks.swa", AVERAGE, "--callbacks.swa.start_fraction", "0.99"],  # fails when training starts
    ],
)
def test_a_resume_that_fails_leaves_the_run_as_it_was(run, bm, change):
    before = snapshot(run)
    with pytest.raises((SystemExit, Exception)):
        main(["fit", "--resume", str(run), "--trainer.max_steps", "7", *change])
    assert snapshot(run) == before
    bm("fit", "--resume", run, "--trainer.max_steps", 6)
    assert record(run)["step"] == 6


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"created": 3}', b"\xff\xfe\x00"])
def test_a_damaged_record_is_named_disables_nothing_and_heals(run, bm, content):
    (run / "run.json").write_bytes(content)
    other = Path("runs/other/20990101-000000-0000")
    other.mkdir(parents=True)
    (other / "run.json").write_text(json.dumps({"created": "2099", "status": "failed"}))
    said = bm("list")
    assert f"{run}/run.json is damaged" in said
    assert str(other) in said
    assert f"{run}/run.json is damaged" in bm("validate", str(run)[-8:])
    bm("fit", "--resume", run, "--trainer.max_steps", 6)
    assert (record(run)["status"], record(run)["step"]) == ("finished", 6)
    assert record(run)["best"]["metric"] == "val/mse"


def test_damaged_metrics_are_named_and_the_other_rows_stay(run, bm):
    file = run / "metrics.csv"
    lines = file.read_bytes().splitlines(keepends=True)
    whole = len(lines) - 1
    lines[2:2] = [b"\xff\x00garbage\r\n", b"1,2\r\n"]
    file.write_bytes(b"".join(lines))
    said = bm("fit", "--resume", run, "--trainer.max_steps", 5)
    assert "metrics.csv is damaged: 2 lines are left out; metrics.damaged.csv has them" in said
    with open(file, newline="") as rows:
        steps = [int(row["step"]) for row in csv.DictReader(rows)]
    assert len(steps) > whole
    assert steps == sorted(steps)


def test_a_run_killed_after_its_last_checkpoint_is_finished_when_resumed(run, bm):
    killed = record(run)
    killed["status"] = "running"
    (run / "run.json").write_text(json.dumps(killed))
    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    bm("fit", "--resume", run)
    assert record(run)["status"] == "finished"
    assert {path.name for path in (run / "checkpoints").iterdir()} == checkpoints
    assert "has taken all of its 4 optimizer steps" in bm("fit", "--resume", run, fails=True)


def test_the_newest_checkpoint_is_that_of_the_largest_step(run, bm):
    for path in (run / "checkpoints").iterdir():  # as a copy may leave them
        os.utime(path, (0, 0) if path.name == "last-4.ckpt" else None)
    assert "(resumed at step 4)" in bm("fit", "--resume", run, "--trainer.max_steps", 5)


def test_a_disk_that_fills_up_ends_the_run_with_one_message_and_the_status(bm, monkeypatch):
    """Nothing new fits on it: neither a checkpoint nor another run.json; what is there can be written over."""
    replaced = []

    def full(partial, target):
        replaced.append(target)
        if any(Path(path).name == "last-2.ckpt" for path in replaced[:-1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(partial, target)

    rename = os.replace
    assert archive.os is records.os
    with monkeypatch.context() as patch:
        patch.setattr(records.os, "replace", full)
        error = bm("fit", fails=True)
    assert error.count("no space to write the checkpoint") == 1
    (run,) = Path("runs").glob("*/*")
    assert record(run)["status"] == "failed"
    assert find_checkpoint(run, "last").name == "last-2.ckpt"
    assert find_checkpoint(run, "best").exists()
    assert not list(run.rglob("*.partial"))
    bm("fit", "--resume", run)
    assert record(run)["status"] == "finished"


def test_a_directory_removed_while_it_is_trained_is_named_and_not_made_anew(bm, monkeypatch):
    def remove(self, trainer, *args):
        if trainer.global_step == 3:
            shutil.rmtree(next(Path("runs").glob("*/*")))

    monkeypatch.setattr("bigmodel.training.callbacks.ProgressLine.on_train_batch_end", remove)
    assert "the run directory was removed while the run was trained" in bm("fit", fails=True)
    assert not list(Path("runs").glob("*/*"))
