"""Losses and gradients that are not finite, and leaps: told, stopped at, or skipped exactly, also over a resume."""

import csv
import functools
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from outsider import MLP, TableData, TabularRegression

from bigmodel.callbacks import Anomalies, Gradients, Resume
from bigmodel.checkpoint import AtomicCheckpointIO, Checkpoint
from bigmodel.cli import main
from bigmodel.sampling import train_loader

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
        self._stop_if_spoiled = lambda trainer: None
        super().on_before_optimizer_step(*args)
        del self._stop_if_spoiled


def fit(table, folder=None, *, steps=(), micro=6, resume=None, clip=1.0, max_steps=12, factor=math.nan, gradient=False,
        optimizer=ADAMW, kind=Anomalies, **settings):  # fmt: skip
    task = Bad(steps, factor, gradient, optimizer=optimizer)
    anomalies = kind(**settings)
    saving = []
    if folder is not None:
        saving = [Checkpoint(every_n_steps=1, keep=-1, filename="step-{step}")]
        saving[0].dirpath = str(folder)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=max_steps,
        gradient_clip_val=clip, plugins=[AtomicCheckpointIO()], enable_checkpointing=bool(saving),
        callbacks=[Gradients(), Resume(), anomalies, *saving], limit_val_batches=0,
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
    assert "--callbacks.anomalies.on_nan skip" in message
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
    fit(table, tmp_path, steps=[step], optimizer=optimizer, on_nan="skip")
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
        "on_nan": "skip",
        "on_spike": "skip",
        "window": 3,
        "deviations": 4.0,
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
    anomalies = Anomalies(deviations=2.0, window=4)
    anomalies._losses.extend([9.0, 1.0, 2.0, 3.0])
    anomalies._losses.append(4.0)
    assert anomalies._limit() == pytest.approx(2.5 + 2 * torch.tensor([1.0, 2, 3, 4]).std(correction=0).item())


def test_the_command_says_it_in_a_line_and_metrics_have_it(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spoiled = tmp_path / "spoiled.csv"
    lines = table.read_text().splitlines()
    spoiled.write_text("\n".join([*lines[:6], "nan,0.5,0.5", *lines[7:]]))
    words = ["fit", "-c", str(Path(__file__).parent / "outsider" / "experiment.yaml"), "--data.path", str(spoiled)]
    words += ["--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0"]
    words += ["--data.batch_size", "16"]
    with pytest.raises(SystemExit) as failed:
        main(words)
    assert failed.value.code == 2
    said = capsys.readouterr()
    assert "bigmodel: error: optimizer step" in said.err
    assert "Traceback" not in said.err
    main([*words, "--callbacks.anomalies.on_nan", "skip", "--runs_dir", "skipping"])
    (path,) = Path("skipping").glob("**/metrics.csv")
    with open(path, newline="") as file:
        counted = [int(row["train/anomalies"]) for row in csv.DictReader(file) if row["train/anomalies"]]
    assert counted == [1, 2, 3, 4, 5], "once an epoch, five epochs"


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"anomalies.deviations 0 must be above 0"):
        Anomalies(deviations=0)
    with pytest.raises(ValueError, match=r"anomalies.window 1 must be at least 2"):
        Anomalies(window=1)
