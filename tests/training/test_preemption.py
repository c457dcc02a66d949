"""A run stopped by a signal saves, reports it, and resumes bitwise as if uninterrupted, on one and two processes."""

import csv
import itertools
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import stopping
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from stopping import experiment, returning, send_signal

from bigmodel.cli import main
from bigmodel.data.sampling import train_loader
from bigmodel.run import find_checkpoint

draw = random.Random(0)


def only_run(runs_dir):
    (record,) = Path(runs_dir).glob("**/run.json")
    return record.parent


def record(run):
    return json.loads((run / "run.json").read_text())


def metrics(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v and not k.startswith("speed/")} for row in csv.DictReader(file)]


def content(run):
    """Weights, optimizer and average of the last checkpoint, by name."""
    saved = torch.load(find_checkpoint(run, "last"), weights_only=True)
    moments = saved["optimizer_states"][0]["state"]
    return {
        **saved["state_dict"],
        **{f"{i}.{name}": tensor for i, state in moments.items() for name, tensor in state.items()},
        **{f"average.{name}": tensor for name, tensor in saved["callbacks"]["EMA"]["average"].items()},
    }


def assert_same(one, other):
    a, b = content(one), content(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(one) == metrics(other)
    best = [record(run)["best"] for run in (one, other)]
    assert best[0]["value"] == best[1]["value"]
    assert Path(best[0]["checkpoint"]).name == Path(best[1]["checkpoint"]).name


@pytest.fixture(scope="module", params=[12, 4], ids=["whole", "accumulated"])
def straight(request, tmp_path_factory, table):
    """The run that is never stopped, and the flag for its micro-batches of 12 or 4 rows."""
    folder = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    micro = ("--data.micro_batch_size", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", *experiment(table, folder / "runs", *micro)])
    return only_run(folder / "runs"), micro


def stop(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    return stopped.value.code


@pytest.mark.parametrize("during", ["train", "validation"])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_run_stopped_at_any_moment_goes_on_exactly(straight, table, tmp_path, monkeypatch, capfd, number, during):
    monkeypatch.chdir(tmp_path)
    straight, micro = straight
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)]
    a_step = 12 // micro[1]
    # Six steps are an epoch; validation, of two batches, comes after every third.
    batches = draw.randrange(1, 14 * a_step) if during == "train" else draw.randrange(1, 8)
    arguments = experiment(table, "runs", *micro, *send_signal(batches=batches, number=number, during=during))
    assert stop(arguments) == (130 if number == "SIGINT" else 85)
    run = only_run("runs")
    assert record(run)["status"] == ("interrupted" if number == "SIGINT" else "preempted")
    step = record(run)["step"]
    assert step == (-(-batches // a_step) if during == "train" else -(-batches // 2) * 3), "it or the validation ends"
    assert find_checkpoint(run, "last").name == f"last-{step}.ckpt", "the very step it stopped at is saved"
    printed = capfd.readouterr()
    assert f"stopped by {number} at step {step}; `bigmodel fit --resume {run}` resumes from that step" in printed.out
    assert f"{number}: stopping after this optimizer step" in printed.err
    main(["fit", "--resume", str(run), "--callbacks.signal", "null"])
    assert record(run)["status"] == "finished"
    assert_same(run, straight)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)]


def test_at_ends_of_epochs_and_where_validation_is_due(straight, table, tmp_path, monkeypatch):
    """One run, stopped again and again."""
    monkeypatch.chdir(tmp_path)
    straight, micro = straight
    a_step = 12 // micro[1]
    assert stop(experiment(table, "runs", *micro, *send_signal(batches=a_step))) == 85
    run, at = only_run("runs"), 1
    for step in (2, 3, 6, 7):
        assert stop(["--resume", str(run), "--callbacks.signal.batches", str((step - at) * a_step)]) == 85
        assert record(run)["step"] == step
        at = step
    main(["fit", "--resume", str(run), "--callbacks.signal", "null"])
    assert_same(run, straight)


def test_in_the_last_step_the_run_simply_ends(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *experiment(table, "runs", *send_signal(batches=30))])
    assert record(only_run("runs"))["status"] == "finished"


def test_a_second_ctrl_c_stops_at_once(table, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert stop(experiment(table, "runs", *send_signal(batches=5, number="SIGINT", times=2))) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored, for the process to end
    run = only_run("runs")
    assert record(run)["status"] == "interrupted"
    assert record(run)["step"] == 4
    assert not list((run / "checkpoints").glob("last-*"))
    assert "stopped at step 4;" in capfd.readouterr().out


def test_without_a_last_checkpoint_it_says_that_nothing_was_saved(table, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert stop(experiment(table, "runs", "--callbacks.last", "null", *send_signal(batches=5))) == 85
    assert "resumes from the last checkpoint" in capfd.readouterr().out


def test_lightning_handles_signals_again_afterwards(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainers = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, *a, **k: (trainers.append(self), fit(self, *a, **k))[1])
    assert stop(experiment(table, "runs", *send_signal(batches=2))) == 85
    (trainer,) = trainers
    assert "register_signal_handlers" not in vars(trainer._signal_connector)
    assert "_broadcast_sigterm_tensor" not in vars(trainer.fit_loop.epoch_loop)


@pytest.fixture(scope="module")
def two(tmp_path_factory, table):
    """Results of two processes, of which only the second received a signal, in the eighth of 60 micro-batches."""
    folder = tmp_path_factory.mktemp("two")
    lines = table.read_text().splitlines()
    (folder / "spoiled.csv").write_text("\n".join([*lines[:6], "nan,0.5,0.5", *lines[7:]]))
    (folder / "printed").write_text(forked.run(stopping.__file__, table, cwd=folder).stdout)
    return folder


def test_two_processes_stop_at_the_same_step_though_one_was_told(two):
    run = only_run(two / "stopped")
    assert [(two / f"exit.{rank}").read_text() for rank in (0, 1)] == ["85", "85"]
    first, second = record(run)["sessions"]
    assert first["step"] == 0
    assert 4 <= second["step"] <= 14, "one received it in the fourth step; they agree within ten"
    assert_same(run, only_run(two / "straight"))


def test_two_processes_skip_the_same_steps_as_one(two, monkeypatch):
    """The bad sample is in a micro-batch of one of them."""
    monkeypatch.chdir(two)
    arguments = [*experiment("spoiled.csv", "alone"), "--trainer.limit_val_batches", "0", "--model.net.dropout", "0"]
    main(["fit", *arguments, "--callbacks.anomalies.on_nonfinite", "skip"])
    alone, together = content(only_run("alone")), content(only_run("skipping"))
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, together[name], rtol=0, atol=1e-6)
    counts = [[row.get("train/anomalies") for row in metrics(only_run(runs_dir))] for runs_dir in ("alone", "skipping")]
    assert counts[0] == counts[1]
    assert [count for count in counts[0] if count] == ["1", "2", "3", "4"], "in five epochs, of which one leaves it out"


def test_two_processes_go_back_as_one_does(two, monkeypatch):
    monkeypatch.chdir(two)
    arguments = experiment("spoiled.csv", "alone-returning", *returning(1), "--trainer.max_steps", 14)
    main(["fit", *arguments, "--trainer.limit_val_batches", "0", "--model.net.dropout", "0"])
    alone, together = only_run("alone-returning"), only_run("returning")
    places = [
        [(r["step"], r["to"], r["epoch"], r["samples"]) for r in record(run)["returns"]] for run in (alone, together)
    ]
    assert places[0]
    assert places[0] == places[1]
    for name, tensor in content(alone).items():
        torch.testing.assert_close(tensor, content(together)[name], rtol=0, atol=1e-6)


def test_two_processes_tell_which_of_them_the_other_waits_for(two):
    run = only_run(two / "slow")
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ratios = {int(row["step"]): float(row["speed/slowest_over_median"] or 0) for row in rows if row["train/loss"]}
    assert list(ratios) == [3, 6, 9]
    assert min(ratios.values()) > 1.5
    printed = (two / "printed").read_text()
    assert re.search(rf"^step 6: process 1 on {platform.node()} needs [\d.]+ times the median", printed, re.M)
    assert printed.count("process 1 on") == 1, "reported once, if it is so in two consecutive rows"
    times = record(run)["sessions"][0]["times"]
    steps, slept = 8, 0.2 * 2  # two micro-batches; the first step is left out
    assert times["communication"] > 0.5 * steps * slept, "the first process waits for the second"


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return i * i


def test_readers_go_on_until_the_training_process_ends_them():
    loader = train_loader(Squares(), batch_size=4, num_workers=1, shuffle=False)
    batches = iter(loader)
    seen = [next(batches)]
    (reader,) = batches._workers
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):  # to the group, twice
        subprocess.run(["kill", f"-{number.value}", str(reader.pid)], check=True)
    seen += list(batches)
    assert torch.cat(seen).tolist() == [i * i for i in range(64)]

    def end():
        os.kill(reader.pid, signal.SIGTERM)
        time.sleep(100)  # which torch cuts short

    with pytest.raises(RuntimeError, match="killed by signal: Terminated"):  # sent by its parent
        end()
    assert reader.exitcode == -signal.SIGTERM


def test_a_launcher_outside_sees_status_and_message(table, tmp_path):
    """As a person or a scheduler does it: a process of its own, a signal from outside; its readers get it too."""
    arguments = experiment(table, "runs", "--trainer.max_steps", 100000, "--trainer.val_check_interval", 50000)
    arguments += ["--trainer.check_val_every_n_epoch", "null", "--callbacks.progress.every_n_seconds", "0.2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bigmodel", "fit", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step "):
            break
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.01)
    rest, _ = process.communicate(timeout=forked.LIMIT)
    assert process.returncode == 85, "".join(lines) + rest
    assert "resumes from that step" in rest
    assert "Traceback" not in rest
    assert record(only_run(tmp_path / "runs"))["status"] == "preempted"


# Ends that are not by a signal


@pytest.mark.parametrize("end", ["max_time", "should_stop", "early", "manual"])
def test_whatever_ends_a_run_its_last_step_is_saved_and_resumes_exactly(straight, table, tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    straight, micro = straight
    seconds = itertools.count()  # one passes in each micro-batch
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: next(seconds))
    own = ["--callbacks.end", "stopping.StopAfter"]
    early = ["--callbacks.early", "lightning.pytorch.callbacks.EarlyStopping", "--callbacks.early.monitor", "val/mse"]
    flags, undo = {
        "max_time": (["--trainer.max_time", "00:00:00:10"], ["--trainer.max_time", "01:00:00:00"]),
        "should_stop": ([*own, "--callbacks.end.batches", "10"], ["--callbacks.end.batches", "999"]),
        "early": ([*early, "--callbacks.early.stopping_threshold", "100"], ["--callbacks.early.stopping_threshold", "0"]),
        "manual": (["--model", "stopping.Manual", "--model.net", "outsider.MLP", "--trainer.gradient_clip_val", "null"], []),
    }[end]  # fmt: skip
    main(["fit", *experiment(table, "runs", *micro, *flags)])
    run = only_run("runs")
    assert record(run)["status"] == "finished"
    step = record(run)["step"]
    assert find_checkpoint(run, "last").name == f"last-{step}.ckpt"
    if end == "manual":
        return
    assert 0 < step < 30
    main(["fit", "--resume", str(run), *undo])
    one, other = content(run), content(straight)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_without_a_checkpoint_says_so(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    without = ["--callbacks.last", "null", "--callbacks.best", "null"]
    main(["fit", *experiment(table, "runs", *without, "--trainer.max_steps", "2")])
    assert "no checkpoint was saved" in capsys.readouterr().out
