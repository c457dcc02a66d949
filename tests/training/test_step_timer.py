"""Where time goes: parts that sleep for a known time are found to take it, and nothing is lost or counted twice."""

import functools
import json
import re
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from outsider import MLP, TableData, TabularRegression

from bigmodel.checkpoint import AtomicCheckpointIO
from bigmodel.cli import main
from bigmodel.training.callbacks import GradientScaling, Resume, StepTimer, TrainingLog
from bigmodel.training.callbacks.checkpoint import Checkpoint
from bigmodel.training.callbacks.clocks import DeviceClock

SLEPT = {"data": 5, "forward": 7, "backward": 9, "optimizer": 11, "validation": 13, "checkpoint": 15, "other": 17}  # ms
STEPS, MICRO_BATCHES, VALIDATIONS = 12, 2, 3
slept = dict.fromkeys(SLEPT, 0.0)  # s; on a busy machine it is more than was asked for


def sleep(part):
    start = time.perf_counter()
    time.sleep(SLEPT[part] / 1e3)
    slept[part] += time.perf_counter() - start


class SlowData(TableData):
    def setup(self, stage):
        super().setup(stage)
        read = self.train.__getitem__
        self.train.__getitems__ = lambda numbers: (
            sleep("data"),
            torch.utils.data.default_collate([read(i) for i in numbers]),
        )[1]


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):
        loss = closure()
        sleep("optimizer")
        super().step()
        return loss


class SlowTask(TabularRegression):
    def training_step(self, batch):
        output = super().training_step(batch)
        sleep("forward")
        output["loss"].register_hook(lambda grad: sleep("backward"))
        return output

    def validation_step(self, batch):
        sleep("validation")
        super().validation_step(batch)


class SlowSave(AtomicCheckpointIO):
    def save_checkpoint(self, *args, **kwargs):
        sleep("checkpoint")
        super().save_checkpoint(*args, **kwargs)


class SlowCallback(Callback):
    def on_train_batch_end(self, *args):
        sleep("other")


@pytest.fixture(scope="module")
def slow(table, tmp_path_factory):
    """Times of a run of 13 steps of two micro-batches, validated (in one batch) and saved after every fourth; how long the
    last 12 took; and how long each part slept in them."""

    class Clock(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 1 and not hasattr(self, "start"):
                self.start, self.before = time.perf_counter(), dict(slept)

        def on_train_end(self, *args):
            self.seconds = time.perf_counter() - self.start

    times, clock = StepTimer(), Clock()
    saving = Checkpoint(every_n_steps=4, save_top_k=1)
    saving.dirpath = str(tmp_path_factory.mktemp("slow"))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=STEPS + 1,
        plugins=[SlowSave()], num_sanity_val_steps=0, val_check_interval=4, check_val_every_n_epoch=None,
        callbacks=[GradientScaling(), Resume(), times, clock, TrainingLog(), SlowCallback(), saving],
    )  # fmt: skip
    task = SlowTask(functools.partial(MLP, width=8), functools.partial(SlowSGD, lr=0.01))
    trainer.fit(task, SlowData(str(table), "y", batch_size=20, micro_batch_size=10))
    return times.finish(), clock.seconds, {part: slept[part] - clock.before[part] for part in SLEPT}


@pytest.mark.parametrize("part", SLEPT)
def test_each_part_is_found_to_take_what_it_takes(slow, part):
    seconds, _, slept = slow
    saved = VALIDATIONS + 1  # and at the end
    often = {"optimizer": STEPS, "validation": VALIDATIONS, "checkpoint": saved}.get(part, STEPS * MICRO_BATCHES)
    if part == "other":
        often += 1  # what follows the first step's end
    assert SLEPT[part] / 1e3 * often <= slept[part] <= seconds[part] + 1e-3


def test_the_parts_are_the_whole(slow):
    seconds, total, _ = slow
    assert seconds["total"] == pytest.approx(total, abs=1), (
        "on a busy machine much may happen between two looks at a clock"
    )
    assert sum(spent for part, spent in seconds.items() if part != "total") == pytest.approx(seconds["total"])
    assert list(seconds) == [*SLEPT, "total"], "one process: no communication"


def test_the_command_tells_it_in_a_table_and_in_the_record(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", str(Path(__file__).parents[1] / "outsider" / "experiment.yaml"), "--data.path", str(table)]
    words += ["--trainer.accelerator", "cpu"]
    main(words)
    said = capsys.readouterr().out
    table_of_times = said[said.index("time of 9 steps") :].splitlines()
    assert table_of_times[0] == "time of 9 steps, without the first"
    (record,) = Path("runs").glob("**/run.json")
    (session,) = json.loads(record.read_text())["sessions"]
    rows = [line.split() for line in table_of_times[2:-3]]  # below them: speed, best metric, next command
    assert [row[0] for row in rows] == list(session["times"])
    for part, seconds, each, percent in rows:
        spent = session["times"][part]
        assert float(seconds) == pytest.approx(spent, abs=0.006)
        assert float(each) == pytest.approx(spent / 9 * 1e3, abs=0.1)
        assert float(percent) == pytest.approx(100 * spent / session["times"]["total"], abs=1)
    speed, mfu = re.fullmatch(r"  ([\d,]+) samples/s, MFU ([\d.]+)%", table_of_times[-3]).groups()
    assert float(speed.replace(",", "")) == pytest.approx(9 * 32 / session["times"]["total"], rel=0.02)
    assert 0 <= float(mfu) < 100
    assert not (record.parent / "profile").exists(), "without a profiler"
    main([*words, "--trainer.max_steps", "1", "--runs_dir", "short"])
    assert "where the time" not in capsys.readouterr().out, "one step is only warm-up"


def test_a_fit_leaves_the_trainer_as_it_was(table, tmp_path):
    """Also one that fails."""

    class Fails(TabularRegression):
        def training_step(self, batch):
            if self.trainer.global_step == 2:
                raise RuntimeError("as meant")
            return super().training_step(batch)

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=4,
        enable_checkpointing=False, callbacks=[GradientScaling(), Resume(), StepTimer()],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="as meant"):
        trainer.fit(Fails(), TableData(str(table), "y", batch_size=20))
    loop = trainer.fit_loop.epoch_loop
    assert "save_checkpoint" not in vars(trainer)
    assert "run" not in vars(loop.val_loop)
    assert "_on_before_fetch" not in vars(loop)


@pytest.mark.parametrize("name", ["pytorch", "simple", "advanced"])
def test_a_profile_lands_in_the_run_directory(table, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", str(Path(__file__).parents[1] / "outsider" / "experiment.yaml"), "--data.path", str(table)]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "20", "--data.batch_size", "8"]
    main([*words, "--trainer.profiler", name, "--trainer.max_epochs", "null"])
    (record,) = Path("runs").glob("**/run.json")
    folder = record.parent / "profile"
    assert not list(tmp_path.glob("*profile*"))
    assert f"profile    {folder}: a table at the end" in capsys.readouterr().out
    assert "training_step" in (folder / "fit-profile.txt").read_text()
    if name == "pytorch":
        assert {path.name for path in folder.iterdir()} == {"fit-profile.txt", "trace-0.json"}
        events = json.loads((folder / "trace-0.json").read_text())["traceEvents"]
        steps = [event for event in events if re.fullmatch(r"Optimizer\.step#AdamW\.step", event.get("name", ""))]
        assert len(steps) == 3, "of 20"
        assert {"aten::addmm", "[pl][module]torch.nn.modules.linear.Linear: net.layers.0"} <= {
            e.get("name") for e in events
        }


class Event:
    """A CUDA event as it is seen from the host: it has passed when the device has come to it."""

    now = queued = 0.0  # ms

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.queued

    def query(self):
        return self.at <= Event.now

    def synchronize(self):
        Event.now = max(Event.now, self.at)

    def elapsed_time(self, end):
        assert end.query()
        return end.at - self.at


def test_a_device_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = DeviceClock()
    for _ in range(3):
        for part, ms in (("data", 1), ("forward", 20), ("backward", 40)):
            clock.mark(part)
            Event.queued += ms
    assert clock.so_far("forward") == 0, "it has done nothing yet"
    Event.now = 61.0
    assert [clock.so_far(part) for part in ("data", "forward", "backward")] == [0.001, 0.02, 0.04]
    assert Event.now == 61.0
    clock.mark("checkpoint")
    Event.queued += 5
    assert {part: spent for part, spent in clock.read().items() if spent} == pytest.approx(
        {"data": 0.003, "forward": 0.06, "backward": 0.12, "checkpoint": 0.005}
    )
    clock.reset()
    Event.queued += 7
    assert {part: spent for part, spent in clock.read().items() if spent} == pytest.approx({"other": 0.007})
