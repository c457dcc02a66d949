"""A run stopped at any checkpoint and resumed equals the run that was never stopped: weights, average, samples, metrics,
bitwise; dropout, clipping, accumulation and validation in mid-epoch included (statement 23 of the design's references)."""

import functools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from outsider import MLP, TableData, TabularRegression

from bigmodel.checkpoint import AtomicCheckpointIO, read
from bigmodel.data.sampling import Permutation
from bigmodel.data.schedule import num_steps
from bigmodel.training.callbacks import EMA, GradientScaling, Resume
from bigmodel.training.callbacks.checkpoint import Checkpoint
from bigmodel.training.schedules import Constant, Cosine


@dataclass
class Recorder(Callback):
    """What a run saw and found, by optimizer step."""

    samples: list = field(default_factory=list)
    validations: list = field(default_factory=list)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.samples += batch.index.tolist()

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validations.append((trainer.global_step, float(trainer.callback_metrics["val/mse"])))


class NoValidation(TableData):
    """Data without a split for validation."""

    def val_dataloader(self):
        return []


def fit(
    table,
    folder,
    *,
    resume=None,
    micro=None,
    schedule=None,
    batch_size=12,
    allow=(),
    data=TableData,
    **options,
):
    task = TabularRegression(
        functools.partial(MLP, width=8, dropout=0.2),
        functools.partial(torch.optim.AdamW, lr=0.01),
        schedule or Cosine(warmup_steps=3),
    )
    data = data(str(table), "y", batch_size=batch_size, micro_batch_size=micro)
    recorder, average = Recorder(), EMA(0.9)
    every = Checkpoint(every_n_steps=1, save_top_k=-1, filename="step-{step}")
    best = Checkpoint(monitor="val/mse", save_top_k=-1, filename="best-{step}")
    every.dirpath = best.dirpath = str(folder)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[GradientScaling(), Resume(0, "data" in allow, "batch" in allow), average, recorder, every, best],
        **options,
    )
    trainer.fit(task, data, ckpt_path=resume)
    return task, recorder, average


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 16},
        {"max_epochs": 3},
        {"max_steps": 16, "val_check_interval": 2},
        {"max_steps": 16, "val_check_interval": 5, "check_val_every_n_epoch": None},
        {"max_epochs": 3, "val_check_interval": 0.5},
        {"max_epochs": 4, "check_val_every_n_epoch": 2},
        {"max_epochs": 3, "data": NoValidation},
        {"max_epochs": 3, "limit_train_batches": 4},
        {"max_epochs": 3, "limit_train_batches": 4, "val_check_interval": 2},
        {"max_epochs": 2, "limit_train_batches": 0.7, "val_check_interval": 0.5},
        {"max_steps": 7, "limit_train_batches": 3, "check_val_every_n_epoch": 2},
        {"max_epochs": 3, "overfit_batches": 2},
    ],
    ids=lambda options: ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()),
)
@pytest.mark.parametrize("micro", [None, 4])
def test_resuming_anywhere_is_exact(table, tmp_path, options, micro):
    task, recorder, average = fit(table, tmp_path / "straight", micro=micro, **options)
    checkpoints = sorted((tmp_path / "straight").iterdir())
    assert {int(path.stem.split("-")[1]) for path in checkpoints} == set(range(1, task.trainer.global_step + 1))
    for path in checkpoints:
        step = int(path.stem.split("-")[1])
        again, resumed, resumed_average = fit(table, tmp_path / "resumed", resume=path, micro=micro, **options)
        assert resumed.samples == recorder.samples[step * 12 :], path
        assert resumed.validations == [row for row in recorder.validations if row[0] > step], path
        assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True)), path
        for name, tensor in average.average.items():
            assert torch.equal(tensor, resumed_average.average[name]), (path, name)


def test_another_micro_batch_size_sees_the_same_samples(table, tmp_path):
    task, recorder, _ = fit(table, tmp_path / "straight", max_epochs=3, micro=4)
    for step in (2, 6, 9):
        again, resumed, _ = fit(
            table, tmp_path / "resumed", resume=tmp_path / "straight" / f"step-{step}.ckpt", micro=12, max_epochs=3
        )
        assert resumed.samples == recorder.samples[step * 12 :]
        assert [s for s, _ in resumed.validations] == [s for s, _ in recorder.validations if s > step]
        assert again.trainer.global_step == task.trainer.global_step


def test_a_finished_run_can_be_made_longer(table, tmp_path):
    schedule = Constant(warmup_steps=2)
    task, recorder, _ = fit(table, tmp_path / "long", max_steps=20, schedule=schedule)
    fit(table, tmp_path / "short", max_steps=15, schedule=schedule)
    again, resumed, _ = fit(
        table, tmp_path / "more", resume=tmp_path / "short" / "step-15.ckpt", max_steps=20, schedule=schedule
    )
    assert resumed.samples == recorder.samples[15 * 12 :]
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True))


def order(epoch, n=80):
    return Permutation(n, 0, epoch)(np.arange(n)).tolist()


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize(
    ("options", "steps", "num_epochs"),
    [
        ({"max_epochs": 3}, 6, 3),
        ({"max_epochs": 3, "limit_train_batches": 4}, 4, 3),
        ({"max_epochs": 3, "limit_train_batches": 100}, 6, 3),
        ({"max_epochs": 3, "limit_train_batches": 0.7}, 4, 3),
        ({"max_steps": 11, "limit_train_batches": 4}, 4, 11 / 4),
        ({"max_steps": 11, "max_epochs": 2, "limit_train_batches": 4}, 4, 2),
        ({"max_epochs": 2, "overfit_batches": 3}, 3, 2),
        ({"max_epochs": 2, "overfit_batches": 0.5}, 3, 2),
        ({"fast_dev_run": True}, 1, 1),
    ],
    ids=str,
)
def test_an_epoch_ends_where_its_limit_is(table, tmp_path, options, steps, num_epochs, micro):
    """`steps` of the epoch's 6, by hand: samples from the start of each epoch's order, a validation after it, a schedule
    that ends with the run."""
    task, recorder, _ = fit(table, tmp_path, micro=micro, **options)
    whole, total = int(num_epochs), round(num_epochs * steps)
    epochs = [0 if "overfit_batches" in options else epoch for epoch in range(whole + 1)]
    expected = [number for epoch in epochs for number in order(epoch)[: steps * 12]]
    assert recorder.samples == expected[: total * 12]
    assert [step for step, _ in recorder.validations] == [steps * epoch for epoch in range(1, whole + 1)]
    assert task.trainer.global_step == num_steps(task.trainer) == total
    if total > 3:  # steps of warm-up
        assert task.optimizers().param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_a_limit_below_one_step_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match=r"--trainer.limit_train_batches 0.1 of an epoch of 6 optimizer steps"):
        fit(table, tmp_path, max_epochs=1, limit_train_batches=0.1)


def test_changed_data_or_batch_is_refused(table, tmp_path):
    fit(table, tmp_path / "a", max_steps=3)
    changed = tmp_path / "changed.csv"
    changed.write_text(table.read_text().replace("0.", "0.0", 1))
    with pytest.raises(ValueError, match=r"not those that the checkpoint was trained on .* --allow_changed_data"):
        fit(changed, tmp_path / "b", resume=tmp_path / "a" / "step-2.ckpt", max_steps=4)
    with pytest.raises(ValueError, match=r"batch_size 8 is not the checkpoint's 12: .* --allow_changed_batch true"):
        fit(table, tmp_path / "c", resume=tmp_path / "a" / "step-2.ckpt", max_steps=4, batch_size=8)


@pytest.mark.parametrize("size", [6, 20])
def test_another_batch_size_on_purpose_sees_each_sample_once(table, tmp_path, capsys, size):
    """In mid-epoch; the new session can be resumed anywhere, bitwise; and be changed again."""
    options = {"max_epochs": 2}
    _, before, _ = fit(table, tmp_path / "a", **options)
    changed = {"resume": tmp_path / "a" / "step-3.ckpt", "batch_size": size, "micro": size // 2, "allow": ["batch"]}
    task, after, average = fit(table, tmp_path / "b", **changed, **options)
    left, whole = (80 - 36) // size, 80 // size
    assert before.samples[:36] + after.samples[: left * size] == order(0)[: 36 + left * size]
    assert after.samples[left * size :] == order(1)[: whole * size]
    assert task.trainer.global_step == 3 + left + whole
    assert [step for step, _ in after.validations] == [3 + left, 3 + left + whole], "at the epochs' ends"
    rate = task.trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0, abs=1e-9), "the schedule ends with the run, which has more or fewer steps now"
    said = capsys.readouterr().out
    assert (
        f"batch_size {size} is not the checkpoint's 12, on purpose. 36 samples were seen in 3 optimizer steps;" in said
    )
    assert f"epoch 0 goes on after 36 of its 80 samples, with {left} steps of {size} (the last" in said
    for path in sorted((tmp_path / "b").iterdir())[::3]:
        step = int(path.stem.split("-")[1])
        again, resumed, resumed_average = fit(
            table, tmp_path / "c", resume=path, batch_size=size, micro=size // 2, **options
        )
        assert resumed.samples == after.samples[(step - 3) * size :], path
        assert resumed.validations == [row for row in after.validations if row[0] > step], path
        assert all(torch.equal(a, b) for a, b in zip(task.parameters(), again.parameters(), strict=True)), path
        assert all(torch.equal(resumed_average.average[k], average.average[k]) for k in average.average), path
    step = 3 + left + 2
    _, last, _ = fit(
        table, tmp_path / "d", resume=tmp_path / "b" / f"step-{step}.ckpt", batch_size=8, allow=["batch"], **options
    )
    assert last.samples == order(1)[2 * size : 2 * size + (80 - 2 * size) // 8 * 8]
    if size == 20:
        assert sorted(after.samples[left * size : (left + 2) * size] + last.samples) == list(range(80)), (
            "20 20 8 8 8 8 8"
        )


def test_where_the_rest_of_an_epoch_makes_no_step_the_next_begins(table, tmp_path, capsys):
    fit(table, tmp_path / "a", max_epochs=2)
    changed = {"resume": tmp_path / "a" / "step-5.ckpt", "batch_size": 40, "allow": ["batch"]}
    _, after, _ = fit(table, tmp_path / "b", max_epochs=2, **changed)
    assert after.samples == order(1)
    assert [step for step, _ in after.validations] == [7]
    assert "the 20 samples left make no step and are left out, and so is its last validation" in capsys.readouterr().out
    _, ended, _ = fit(
        table, tmp_path / "c", max_epochs=2, resume=tmp_path / "a" / "step-6.ckpt", batch_size=40, allow=["batch"]
    )
    assert ended.samples == order(1), "at an epoch's end, after its validation"


def test_other_data_on_purpose(table, tmp_path, capsys):
    """As many samples: from the same place in their order. More: a new epoch, in which each is seen once."""
    fit(table, tmp_path / "a", max_epochs=2)
    changed, longer = tmp_path / "changed.csv", tmp_path / "longer.csv"
    changed.write_text(table.read_text().replace("0.", "0.0", 1))
    resume = {"resume": tmp_path / "a" / "step-2.ckpt", "max_epochs": 2, "allow": ["data"]}
    _, after, _ = fit(changed, tmp_path / "b", **resume)
    assert after.samples == order(0)[24:72] + order(1)[:72]
    assert "epoch 0 goes on after 24 of its 80 samples, with 4 steps of 12" in capsys.readouterr().out
    lines = table.read_text().splitlines()
    longer.write_text("\n".join([*lines, *lines[1:21]]))  # 96 for training
    task, after, _ = fit(longer, tmp_path / "c", **resume)
    assert after.samples == order(1, 96)
    assert task.trainer.global_step == 10
    assert "epoch 1 goes on after 0 of its 96 samples, with 8 steps of 12" in capsys.readouterr().out
    _, resumed, _ = fit(longer, tmp_path / "d", resume=tmp_path / "c" / "step-5.ckpt", max_epochs=2)
    assert resumed.samples == order(1, 96)[36:]


def test_accumulation_is_derived_not_typed(table, tmp_path):
    with pytest.raises(ValueError, match=r"accumulate_grad_batches 2: accumulation follows from"):
        fit(table, tmp_path, max_steps=2, accumulate_grad_batches=2)


def test_a_failed_write_leaves_the_earlier_checkpoint(table, tmp_path, monkeypatch):
    fit(table, tmp_path / "a", max_steps=2)
    kept = (tmp_path / "a" / "step-2.ckpt").read_bytes()
    save = torch.save

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"no space to write the checkpoint .* earlier checkpoints are intact"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a" / "step-2.ckpt")
    monkeypatch.setattr(torch, "save", save)
    assert (tmp_path / "a" / "step-2.ckpt").read_bytes() == kept
    assert not list((tmp_path / "a").glob(".*partial"))
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=r"damaged.ckpt cannot be read as a checkpoint"):
        read(damaged)
