"""Checkpoints that can be trusted: a damaged one is found and named, another is used and that is said, and a file that is
written while training goes on is the one that would have been written without."""

import functools
import json
import os
import shutil
import threading
from datetime import timedelta
from pathlib import Path

import damaged_checkpoint
import forked
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from outsider import MLP, TableData, TabularRegression

import bigmodel
from bigmodel.checkpoint import AtomicCheckpointIO, checkpoint_step, files, find_checkpoint, find_damage, read
from bigmodel.training.callbacks import GradientScaling, Resume
from bigmodel.training.callbacks import checkpoint as callback
from bigmodel.training.callbacks.checkpoint import Checkpoint


def run_directory():
    (record,) = Path("runs").glob("**/run.json")
    return record.parent


def flip(path, position=None):
    """Turn one bit of a file, in its middle if it is not said where."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def strip_checksum(path):
    """Write a checkpoint as an earlier version wrote it."""
    torch.save(torch.load(path, weights_only=True), path)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Files


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path = tmp_path / "small.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weight": torch.arange(3.0)}, path)
    assert find_damage(path) is None
    content = path.read_bytes()

    def check(damaged, n):
        path.write_bytes(damaged)
        os.utime(path, ns=(n, n))  # the clock of files is coarse: else it might look unchanged
        assert find_damage(path) is not None

    for n in range(len(content)):
        check(content[:n] + bytes([content[n] ^ 1 << n % 8]) + content[n + 1 :], n)
        if n % 16 == 0 or len(content) - n < 100:
            check(content[:n], n)
    check(content + b"\0", len(content))
    with pytest.raises(ValueError, match=r"small.ckpt cannot be read as a checkpoint: it is truncated"):
        read(path)
    path.write_bytes(content)
    assert torch.equal(read(path)["weight"], torch.arange(3.0))


def test_others_read_the_file_and_tied_tensors_stay_tied(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    for asynchronous in (False, True):
        path = tmp_path / f"{asynchronous}.ckpt"
        writer = AtomicCheckpointIO(asynchronous)
        writer.save_checkpoint({"a": weight, "b": weight.t()}, path)
        writer.teardown()
        for content in (torch.load(path, weights_only=True), writer.load_checkpoint(path)):
            assert torch.equal(content["a"], weight)
            assert content["a"].data_ptr() == content["b"].data_ptr()
    assert (tmp_path / "True.ckpt").read_bytes() == (tmp_path / "False.ckpt").read_bytes()


def test_a_write_that_is_stopped_leaves_the_earlier_file_with_its_checksum(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, path)
    for stopped in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, stopped, interrupt)
            with pytest.raises(KeyboardInterrupt):
                writer.save_checkpoint({"step": 2}, path)
        assert find_damage(path) is None
        assert read(path) == {"step": 1}
        assert names(tmp_path) == ["last.ckpt"]


def test_a_checkpoint_without_a_checksum_is_read_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "old.ckpt"
    torch.save({"step": 3}, path)
    assert read(path) == read(path) == {"step": 3}
    assert capsys.readouterr().err == f"{path} has no checksum, and is not verified: an earlier version wrote it\n"
    path.write_bytes(path.read_bytes()[:-100])
    assert find_damage(path) is not None


# A thread that writes


@pytest.fixture
def held(monkeypatch):
    """An event for which the writing thread waits before it gives a file its name."""
    release, replace = threading.Event(), os.replace

    def wait(source, target):
        assert release.wait(300)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", wait)
    yield release
    release.set()


def test_what_a_thread_writes_is_what_was_there_when_it_was_saved(tmp_path, held):
    weight, writer = torch.zeros(1000), AtomicCheckpointIO(asynchronous=True)
    (tmp_path / "earlier.ckpt").touch()
    writer.save_checkpoint({"weight": weight}, tmp_path / "new.ckpt")
    weight += 1
    writer.remove_checkpoint(tmp_path / "earlier.ckpt")
    assert "earlier.ckpt" in names(tmp_path)
    assert "new.ckpt" not in names(tmp_path)
    threading.Timer(0.1, held.set).start()
    assert float(writer.load_checkpoint(tmp_path / "new.ckpt")["weight"].sum()) == 0, "a load waits"
    assert names(tmp_path) == ["new.ckpt"]
    writer.teardown()


def test_what_fails_in_the_thread_is_raised_and_the_earlier_file_stays(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for ask in (
        lambda writer: writer.save_checkpoint({}, tmp_path / "next.ckpt"),
        lambda writer: writer.teardown(),
        lambda writer: writer.load_checkpoint(tmp_path / "earlier.ckpt"),
    ):
        writer = AtomicCheckpointIO(asynchronous=True)
        (tmp_path / "earlier.ckpt").touch()
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", full)
            writer.save_checkpoint({"weight": torch.zeros(2)}, tmp_path / "new.ckpt")
            writer.remove_checkpoint(tmp_path / "earlier.ckpt")
            with pytest.raises(OSError, match="no space to write the checkpoint"):
                ask(writer)
        writer.teardown()  # once said, it is not said again
        assert names(tmp_path) == ["earlier.ckpt"]


def test_a_run_whose_files_a_thread_writes_is_the_same_run(bm):
    often = [
        "--callbacks.last.every_n_steps",
        1,
        "--callbacks.last.every_n_minutes",
        "null",
        "--callbacks.last.save_top_k",
        -1,
    ]
    bm("fit", *often, "--runs_dir", "a")
    both = ["--callbacks.last.asynchronous", "true", "--callbacks.best.asynchronous", "true"]
    bm("fit", *often, *both, "--runs_dir", "b")
    (a,), (b,) = Path("a").glob("*/*/checkpoints"), Path("b").glob("*/*/checkpoints")
    assert names(a) == names(b)
    for name in names(a):
        straight, threaded = read(a / name), read(b / name)
        assert same(straight["state_dict"], threaded["state_dict"])
        states = [content["optimizer_states"][0]["state"] for content in (straight, threaded)]
        assert all(same(states[0][n], states[1][n]) for n in states[0])
        if checkpoint_step(b / name) > 3:
            (b / name).unlink()
    bm("fit", "--resume", "last", "--runs_dir", "b")
    assert same(read(a / "last-10.ckpt")["state_dict"], read(b / "last-10.ckpt")["state_dict"])
    assert json.loads((b.parent / "run.json").read_text())["status"] == "finished"


def test_a_run_whose_writer_fails_fails_and_says_so(bm, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: full() if "last-10" in str(b) else replace(a, b))
    error = bm("fit", "--callbacks.last.asynchronous", "true", fails=True)
    assert "no space to write the checkpoint" in error
    assert json.loads((run_directory() / "run.json").read_text())["status"] == "failed"


def test_a_strategy_that_writes_its_own_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match=r"--callbacks.NAME.asynchronous true: SingleDeviceStrategy"):
        fit(table, tmp_path, Checkpoint(asynchronous=True), max_steps=2, plugins=[])


# Which are kept


def fit(table, folder, *callbacks, resume=None, plugins=None, **options):
    for each in callbacks:
        if isinstance(each, Checkpoint):
            each.dirpath = str(folder)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()] if plugins is None else plugins,
        callbacks=[GradientScaling(), Resume(0), *callbacks], **options,
    )  # fmt: skip
    task = TabularRegression(functools.partial(MLP, width=8), functools.partial(torch.optim.AdamW, lr=0.01))
    trainer.fit(task, TableData(str(table), "y", batch_size=12), ckpt_path=resume)


def test_the_latest_n_are_kept_over_resumes(table, tmp_path):
    def every():
        return Checkpoint(every_n_steps=1, save_top_k=3, filename="last-{step}")

    fit(table, tmp_path, every(), max_steps=4)
    assert names(tmp_path) == ["last-2.ckpt", "last-3.ckpt", "last-4.ckpt"]
    fit(table, tmp_path, every(), max_steps=5, resume=tmp_path / "last-4.ckpt")
    assert names(tmp_path) == ["last-3.ckpt", "last-4.ckpt", "last-5.ckpt"]
    fit(table, tmp_path, every(), max_steps=9, resume=tmp_path / "last-5.ckpt")
    assert names(tmp_path) == ["last-7.ckpt", "last-8.ckpt", "last-9.ckpt"], "none is left by a resume"


def test_the_state_of_an_earlier_version_is_read_in_another_folder(tmp_path):
    lightnings = ModelCheckpoint(monitor="val/mse", save_top_k=2)
    lightnings.best_model_score, lightnings.best_model_path = torch.tensor(0.5), "/earlier/best-2.ckpt"
    lightnings.best_k_models = {"/earlier/best-1.ckpt": torch.tensor(0.7), "/earlier/best-2.ckpt": torch.tensor(0.5)}
    (tmp_path / "best-2.ckpt").touch()
    ours = Checkpoint(monitor="val/mse", save_top_k=2)
    assert ours.state_key == lightnings.state_key.removeprefix("Model")
    ours.dirpath = str(tmp_path)
    ours.load_state_dict(lightnings.state_dict())
    assert ours.best_model_path == str(tmp_path / "best-2.ckpt")
    assert ours.best_model_score == 0.5
    assert ours.best_k_models == {ours.best_model_path: 0.5}, "the other is gone"
    timed = ModelCheckpoint(train_time_interval=timedelta(minutes=2.5))
    assert Checkpoint(every_n_minutes=2.5).state_key == timed.state_key.removeprefix("Model")


def test_conflicting_settings_are_refused():
    for settings in (
        {"monitor": "val/mse", "every_n_steps": 3}, {"every_n_steps": 3, "every_n_minutes": 1.0}, {"every_n_steps": 0},
        {"save_top_k": -2}, {"mode": "largest"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"--callbacks\.NAME\."):
            Checkpoint(**settings)


class Clock(Callback):
    """A minute passes in each step."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.now += 60


def test_one_is_kept_every_so_many_minutes_of_training_whatever_stops_it(table, tmp_path, monkeypatch):
    def kept(folder, resume=None):
        clock = Clock()
        monkeypatch.setattr(callback, "time", clock)
        keeper = Checkpoint(every_n_minutes=5, save_top_k=-1, filename="keep-{step}")
        fit(table, folder, clock, keeper, Checkpoint(every_n_steps=1, save_top_k=-1), max_steps=17, resume=resume)
        return sorted(checkpoint_step(path) for path in folder.glob("keep-*"))

    assert kept(tmp_path / "straight") == [5, 10, 15, 17], "the end is always kept"
    assert kept(tmp_path / "a", tmp_path / "straight" / "4.ckpt") == [5, 10, 15, 17]
    assert kept(tmp_path / "b", tmp_path / "a" / "8.ckpt") == [10, 15, 17]


# Runs with a damaged checkpoint


def test_a_damaged_newest_checkpoint_is_passed_over(bm):
    bm("fit", "--callbacks.last.save_top_k", 2, "--callbacks.last.every_n_steps", 3,
       "--callbacks.last.every_n_minutes", "null", "--callbacks.best", "null")  # fmt: skip
    run = run_directory()
    folder = run / "checkpoints"
    assert names(folder) == ["last-10.ckpt", "last-9.ckpt"]
    straight = read(folder / "last-10.ckpt")["state_dict"]
    straight = {name: tensor.clone() for name, tensor in straight.items()}
    flip(folder / "last-10.ckpt")

    message = f"{folder}/last-10.ckpt is damaged (it has changed since it was written: SHA-256"
    instead = "last-9.ckpt is used instead; optimizer steps lost: 1"
    said = bm("validate", run, "--checkpoint", "last")
    assert message in said
    assert instead in said
    assert json.loads((run / "validate.json").read_text())["checkpoint"].endswith("last-9.ckpt")
    with pytest.raises(ValueError, match=r"last-10.ckpt cannot be read as a checkpoint: .* --checkpoint last selects"):
        bigmodel.load(run, "last-10")
    with pytest.raises(ValueError, match=r"last-10.ckpt cannot be read .*: it has changed since it was written"):
        bigmodel.load(folder / "last-10.ckpt")
    assert "last-10.ckpt cannot be read" in bm("validate", run, "--checkpoint", "last-10.ckpt", fails=True)

    said = bm("fit", "--resume", run)
    assert message in said
    assert instead in said
    assert "(resumed at step 9)" in said
    assert same(read(folder / "last-10.ckpt")["state_dict"], straight), "and the run ends as it had ended"
    assert find_damage(folder / "last-10.ckpt") is None

    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    error = bm("fit", "--resume", run, fails=True)
    assert f"no checkpoint in {folder} can be read:" in error
    assert error.count("it is truncated, or not a checkpoint") == 2


def test_in_place_of_a_damaged_best_another_best_is_taken_before_the_last(bm, capsys):
    bm("fit", "--callbacks.best.save_top_k", 3)
    run = run_directory()
    *others, best = sorted(run.glob("checkpoints/best-*"), key=checkpoint_step)
    assert find_checkpoint(run) == best, "the error falls all the time"
    flip(best)
    capsys.readouterr()
    assert find_checkpoint(run) == others[-1]
    assert "best-8.ckpt is used instead; optimizer steps lost: 2" in capsys.readouterr().err
    assert find_checkpoint(run, verify=False) == best
    for path in others:
        flip(path)
    assert find_checkpoint(run).name == "last-10.ckpt"
    strip_checksum(run / "checkpoints" / "last-10.ckpt")
    assert same(bigmodel.load(run).state_dict(), bigmodel.load(run, "last").state_dict())
    assert capsys.readouterr().err.count("last-10.ckpt has no checksum, and is not verified") == 1


def test_of_two_processes_one_verifies_and_the_other_follows(bm, table, tmp_path):
    bm("fit", "--callbacks.last.save_top_k", 2, "--callbacks.last.every_n_steps", 3,
       "--callbacks.last.every_n_minutes", "null", "--callbacks.best", "null",
       "--trainer.max_epochs", "null", "--trainer.max_steps", 10)  # fmt: skip
    run, two = run_directory(), tmp_path / "two"
    shutil.copytree(run, two)
    for directory in (run, two):
        flip(directory / "checkpoints" / "last-10.ckpt")
    result = forked.run(damaged_checkpoint.__file__, two, table)
    assert not (tmp_path / "verified.1").exists()
    assert set((tmp_path / "verified.0").read_text().split()) == {"last-10.ckpt", "last-9.ckpt"}
    assert result.stderr.count("last-9.ckpt is used instead; optimizer steps lost: 1") == 2, "once for each command"
    assert json.loads((two / "validate.json").read_text())["checkpoint"].endswith("last-9.ckpt")
    sessions = json.loads((two / "run.json").read_text())["sessions"]
    assert [session["step"] for session in sessions] == [0, 9]
    bm("fit", "--resume", run, "--trainer.max_steps", 12)
    one, both = (read(directory / "checkpoints" / "last-12.ckpt")["state_dict"] for directory in (run, two))
    for name in one:
        torch.testing.assert_close(one[name], both[name], rtol=0, atol=1e-6)
