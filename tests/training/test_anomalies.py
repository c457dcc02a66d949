"""Losses and gradients that are not finite, and leaps: told, stopped at, or skipped exactly, also over a resume."""

import csv
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from outsider import MLP, TableData, TabularRegression
from stopping import experiment, returning

from bigmodel.checkpoint import AtomicCheckpointIO, find_checkpoint
from bigmodel.cli import main
from bigmodel.data.sampling import Permutation, train_loader
from bigmodel.data.schedule import DataPosition
from bigmodel.data.stateless_rng import hash_seed
from bigmodel.training.callbacks import Anomalies, GradientScaling, Resume, RollbackRequested
from bigmodel.training.callbacks.checkpoint import Checkpoint
from bigmodel.training.optimizers import configure

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
FUSED = [functools.partial(optimizer, fused=True) for optimizer in (SGD, ADAMW)]


class Bad(TabularRegression):
    """The loss of chosen optimizer steps is multiplied by a number; with `gradient`, its gradient alone."""

    def __init__(self, steps=(), factor=math.nan, gradient=False, **options):
        super().__init__(functools.partial(MLP, width=8), **options)
        self.steps, self.factor, self.gradient = steps, factor, gradient

    def training_step(self, batch):
        output = super().training_step(batch)
        if self.trainer.global_step + 1 in self.steps:
            if self.gradient:
                output["loss"].register_hook(lambda grad: grad * self.factor)
            else:
                output["loss"] = output["loss"] * self.factor
        return output


class AsOnAGPU(Anomalies):
    """Does not look at a step's figures before the next one, as where nothing may wait for the device."""

    def on_before_optimizer_step(self, *args):
        self._check_if_fatal = lambda trainer: None
        super().on_before_optimizer_step(*args)
        del self._check_if_fatal


def fit(table, folder=None, *, steps=(), micro=6, resume=None, clip=1.0, max_steps=12, factor=math.nan, gradient=False,
        optimizer=ADAMW, kind=Anomalies, **settings):  # fmt: skip
    task = Bad(steps, factor, gradient, optimizer=optimizer)
    anomalies = kind(**settings)
    saving = []
    if folder is not None:
        saving = [Checkpoint(every_n_steps=1, save_top_k=-1, filename="step-{step}")]
        saving[0].dirpath = str(folder)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=max_steps,
        gradient_clip_val=clip, plugins=[AtomicCheckpointIO()], enable_checkpointing=bool(saving),
        callbacks=[GradientScaling(), Resume(), anomalies, *saving], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, TableData(str(table), "y", batch_size=12, micro_batch_size=micro), ckpt_path=resume)
    return task, anomalies


def samples_of(table, step):
    data = TableData(str(table), "y")
    data.setup("fit")
    loader = train_loader(data.train, batch_size=12, micro_batch_size=12)
    loader.set_epoch((step - 1) // 6)
    return list(loader)[(step - 1) % 6].index.tolist()


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_that_is_not_finite_stops_the_run_before_it_spoils_anything(table, tmp_path, clip, gradient):
    with pytest.raises(FloatingPointError) as stopped:
        fit(table, tmp_path, steps=[8], clip=clip, gradient=gradient)
    message = str(stopped.value)
    assert message.startswith("optimizer step 8: loss ")
    assert "not finite; samples " in message
    assert message.split("samples ")[1].startswith(", ".join(map(str, samples_of(table, 8))))
    assert "--callbacks.anomalies.on_nonfinite skip" in message
    assert {path.stem for path in tmp_path.iterdir()} == {f"step-{step}" for step in range(1, 8)}


def test_where_figures_come_late_no_spoiled_checkpoint_is_written_either(table, tmp_path):
    with pytest.raises(FloatingPointError, match="optimizer step 8: loss nan"):
        fit(table, tmp_path, steps=[8], kind=AsOnAGPU)
    assert {path.stem for path in tmp_path.iterdir()} == {f"step-{step}" for step in range(1, 8)}
    with pytest.raises(FloatingPointError, match="optimizer step 12: loss nan"):  # the last, and nothing saves
        fit(table, steps=[12], kind=AsOnAGPU)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW, *FUSED])
@pytest.mark.parametrize("step", [1, 5])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_are(table, tmp_path, optimizer, step):
    fit(table, tmp_path, steps=[step], optimizer=optimizer, on_nonfinite="skip")
    before, after = (
        torch.load(tmp_path / f"step-{n}.ckpt", weights_only=True) if n else None for n in (step - 1, step)
    )
    assert after["global_step"] == step, "step number and position in the data move on"
    if before is not None:
        assert all(torch.equal(before["state_dict"][name], after["state_dict"][name]) for name in after["state_dict"])
        a, b = (saved["optimizer_states"][0]["state"] for saved in (before, after))
        assert all(torch.equal(a[i][name], b[i][name]) for i in b for name in b[i] if b[i][name] is not None)
    last = torch.load(tmp_path / "step-12.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in last["state_dict"].values())
    assert last["callbacks"]["Anomalies"]["count"] == 1


def test_a_run_with_skipped_steps_resumes_exactly(table, tmp_path, capsys):
    settings = {
        "steps": [4, 5, 9],
        "factor": 50.0,
        "on_nonfinite": "skip",
        "on_spike": "skip",
        "window": 3,
        "spike_threshold_std": 4.0,
    }
    task, anomalies = fit(table, tmp_path / "a", **settings)
    assert anomalies.count >= 2
    said = capsys.readouterr().out
    assert "optimizer step 4: loss" in said
    assert "of the last 3 steps); samples" in said
    assert "; skipped" in said
    for step in range(1, 12):
        again, resumed = fit(table, tmp_path / "b", resume=tmp_path / "a" / f"step-{step}.ckpt", **settings)
        assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True)), step
        assert resumed.count == anomalies.count


def test_spikes_are_those_above_mean_and_deviations(table, capsys):
    """By default they are told and passed over; a window that is not full judges nothing."""
    task, anomalies = fit(table, steps=[2, 9], factor=100.0, window=5)
    straight, _ = fit(table, steps=[2, 9], factor=100.0, window=12)
    assert anomalies.count == 1
    assert capsys.readouterr().out.count("optimizer step 9: loss") == 1
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), straight.parameters(), strict=True))
    with pytest.raises(FloatingPointError, match=r"optimizer step 9: loss .* is above .*on_spike skip"):
        fit(table, steps=[9], factor=100.0, window=5, on_spike="stop")


def test_the_limit_is_mean_plus_deviations():
    anomalies = Anomalies(spike_threshold_std=2.0, window=4)
    anomalies._losses.extend([9.0, 1.0, 2.0, 3.0])
    anomalies._losses.append(4.0)
    assert anomalies._limit() == pytest.approx(2.5 + 2 * torch.tensor([1.0, 2, 3, 4]).std(correction=0).item())


def test_the_command_says_it_in_a_line_and_metrics_have_it(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spoiled = tmp_path / "spoiled.csv"
    lines = table.read_text().splitlines()
    spoiled.write_text("\n".join([*lines[:6], "nan,0.5,0.5", *lines[7:]]))
    words = ["fit", "-c", str(Path(__file__).parents[1] / "outsider" / "experiment.yaml"), "--data.path", str(spoiled)]
    words += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0"]
    words += ["--data.batch_size", "16"]
    with pytest.raises(SystemExit) as failed:
        main(words)
    assert failed.value.code == 2
    said = capsys.readouterr()
    assert "bigmodel: error: optimizer step" in said.err
    assert "Traceback" not in said.err
    main([*words, "--callbacks.anomalies.on_nonfinite", "skip", "--runs_dir", "skipping"])
    (path,) = Path("skipping").glob("**/metrics.csv")
    with open(path, newline="") as file:
        counted = [int(row["train/anomalies"]) for row in csv.DictReader(file) if row["train/anomalies"]]
    assert counted == [1, 2, 3, 4, 5], "once an epoch, five epochs"


def order(epoch, seed=0):
    return Permutation(80, seed, epoch)(np.arange(80)).tolist()


def spoil(table, path, numbers, value="nan"):
    lines = table.read_text().splitlines()
    for number in numbers:  # rows of the training split
        line = 1 + number // 4 * 5 + number % 4
        lines[line] = f"0.5,0.5,{value}"
    path.write_text("\n".join(lines))
    return path


def command(*words):
    main(["fit", *map(str, words)])


def the_run(runs_dir):
    (found,) = Path(runs_dir).glob("**/run.json")
    return found.parent, json.loads(found.read_text())


def last(run):
    return torch.load(find_checkpoint(run, "last"), weights_only=True)


def rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if v and not k.startswith("speed/")} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def returned(table, tmp_path_factory):
    """A run of ten steps that goes back twice from a bad sample; its words, where it is, and its record."""
    folder = tmp_path_factory.mktemp("returned")
    # In the fifth step of the first two epochs.
    shared = ((s, set(order(0, s)[48:60]) & set(order(1, s)[48:60]) - set(order(2, s)[:36])) for s in range(99))
    seed, bad = next((s, min(found)) for s, found in shared if found)
    words = [*experiment(spoil(table, folder / "spoiled.csv", [bad]), folder / "runs", *returning(3))]
    words += ["--trainer.max_steps", "10", "--trainer.limit_val_batches", "0", "--data.seed", str(seed)]
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command(*words)
    return words, *the_run(folder / "runs")


def test_a_run_goes_back_and_passes_over_what_was_bad(returned, table):
    _, run, record = returned
    assert (record["status"], record["step"]) == ("finished", 10)
    # Steps 1 to 5, back to 3, step 4 on the rest of the epoch; steps 5 to 9, back to 6, and so on.
    places = [(entry["step"], entry["to"], entry["epoch"], entry["samples"]) for entry in record["returns"]]
    assert places == [(5, 3, 0, 60), (9, 6, 1, 60)]
    assert record["returns"][0]["why"].startswith("optimizer step 5: loss nan")
    assert [session["step"] for session in record["sessions"]] == [0, 3, 6]
    assert [int(row["train/anomalies"]) for row in rows(run) if "train/anomalies" in row] == [1, 2]
    seen = {int(row["step"]): int(row["seen/samples"]) for row in rows(run)}
    assert seen == {step: 12 * step for step in range(1, 11)}, "what was passed over was not seen"
    assert all(tensor.isfinite().all() for tensor in last(run)["state_dict"].values())


def test_passing_over_is_training_on_the_rest(returned):
    """In a plain loop over the same samples."""
    words, run, _ = returned
    first, second, third = (order(epoch, int(words[-1])) for epoch in range(3))
    jumped = first[:36] + first[60:72] + second[:24] + second[60:72] + third
    task, data = TabularRegression(functools.partial(MLP, width=32, dropout=0.2)), TableData(words[3], "y", 12)
    data.setup("fit")
    torch.manual_seed(0)
    task.net = task.make_net(num_features=2)
    optimizer = configure(task, functools.partial(torch.optim.AdamW, lr=0.01))["optimizer"]
    for step in range(10):
        batch = torch.utils.data.default_collate([data.train[i] for i in jumped[12 * step : 12 * step + 12]])
        torch.manual_seed(hash_seed(0, step, 0, 0))
        optimizer.zero_grad()
        (task.training_step(batch)["loss"] / 12).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    weights = last(run)["state_dict"]
    for name, tensor in task.state_dict().items():
        if name.startswith("net"):
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [5, 8])
def test_a_run_that_went_back_and_is_killed_goes_on_exactly(returned, tmp_path, monkeypatch, step):
    """When no checkpoint knows of the return yet, and after the next checkpoint."""
    words, straight, record = returned
    monkeypatch.chdir(tmp_path)
    die = ["--callbacks.die", "stopping.Die", "--callbacks.die.step", step, "--callbacks.die.returns", 1]
    with pytest.raises(RuntimeError, match="killed"):
        command(*words, "--runs_dir", "runs", *die)
    command("--resume", the_run("runs")[0], "--callbacks.die", "null")
    run, resumed = the_run("runs")
    assert [r["to"] for r in resumed["returns"]] == [r["to"] for r in record["returns"]]
    a, b = last(straight), last(run)
    assert a["data"] == b["data"]
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
    average = [saved["callbacks"]["EMA"]["average"] for saved in (a, b)]
    assert all(torch.equal(average[0][name], average[1][name]) for name in average[0])
    assert rows(straight) == rows(run)


def test_a_run_goes_back_from_a_leap(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {sample: order(1).index(sample) for sample in order(0)[72:]}  # not met in epoch 0
    sample, place = next((sample, place) for sample, place in places.items() if 24 <= place < 72)
    spoiled = spoil(table, tmp_path / "spoiled.csv", [sample], "1e4")
    words = [*experiment(spoiled, "runs", *returning(4)), "--callbacks.anomalies.window", "6"]
    command(
        *words,
        "--callbacks.anomalies.on_spike",
        "rollback",
        "--trainer.max_steps",
        "14",
        "--trainer.limit_val_batches",
        "0",
    )
    run, record = the_run("runs")
    (entry,) = record["returns"]
    step = 6 + place // 12 + 1
    to = (step - 1) // 4 * 4
    assert (entry["step"], entry["to"]) == (step, to)
    assert (entry["epoch"], entry["samples"]) == ((1, (step - 6) * 12) if step < 12 else (2, 0))
    said = capsys.readouterr().out
    skipped = f"back to last-{to}.ckpt: the samples of optimizer steps {to + 1} to {step} are skipped"
    assert re.search(rf"optimizer step {step}: loss .* is above .*; samples .*; {skipped}", said)
    assert max(float(row["train/loss"]) for row in rows(run) if "train/loss" in row) < 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--callbacks.anomalies.max_rollbacks", "1"],
            "The run has had 1 rollbacks, and --callbacks.anomalies.max_rollbacks is 1",
        ),
        (
            ["--callbacks.last.every_n_steps", "9", "--trainer.limit_val_batches", "0"],
            "There is no checkpoint yet to",
        ),
    ],
)
def test_where_a_run_cannot_go_back_it_stops(returned, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as failed:
        command(*returned[0], "--runs_dir", "runs", *flags)
    assert failed.value.code == 2
    assert message in capsys.readouterr().err
    assert the_run("runs")[1]["status"] == "failed"


@pytest.mark.parametrize("kind", [Anomalies, AsOnAGPU])
def test_outside_the_command_the_fit_ends_with_what_is_to_be_done(table, tmp_path, kind):
    with pytest.raises(RollbackRequested, match="optimizer step 8: loss nan") as back:
        fit(table, tmp_path, steps=[8], kind=kind, on_nonfinite="rollback")
    assert (back.value.step, back.value.beyond) == (8, DataPosition(8, 1, 24, 96))
    assert {path.stem for path in tmp_path.iterdir()} == {f"step-{step}" for step in range(1, 8)}, "nothing spoiled"


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"anomalies.spike_threshold_std 0 must be above 0"):
        Anomalies(spike_threshold_std=0)
    with pytest.raises(ValueError, match=r"anomalies.window 1 must be at least 2"):
        Anomalies(window=1)
    with pytest.raises(ValueError, match=r"anomalies.max_rollbacks 0 must be at least 1"):
        Anomalies(max_rollbacks=0)
