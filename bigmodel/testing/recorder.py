"""Callback that records samples, losses and weights of a run, and measures of the difference of two runs."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from bigmodel import run
from bigmodel.checkpoint import read
from bigmodel.run.config import Config
from bigmodel.testing.samples import slice_rows
from bigmodel.training.callbacks import Resume
from bigmodel.training.callbacks.gradient_scaling import get_callback

STEPS, STOPPED_AT = 4, 2  # optimizer steps of a run, and the step after which it is stopped and resumed


@dataclass
class RunRecorder(Callback):
    """Callback that records a run of `STEPS` optimizer steps.

    Args:
        dropout: false: disabled.
        seed: of random draws in the training step, not of the weights.
        check_sum: compute the first batch's loss in two halves as well.
        saves: write a checkpoint after `STOPPED_AT` steps and after the last.

    Attributes:
        taken: numbers of the samples of each optimizer step.
        losses: of each micro-batch, as the task returned it.
        evaluated: numbers of the samples of weight above 0, in the order of evaluation.
        start, end: the parameters, copied.
        halves: (loss, count) of the first batch, and of its two halves.
    """

    dropout: bool = True
    seed: int = 0
    check_sum: bool = False
    saves: bool = False
    taken: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    halves: list[tuple[float, float]] = field(default_factory=list)
    output: Any = None  # of the first training step
    batch: Any = None  # the first, on its device
    checkpoints: list[Path] = field(default_factory=list)
    trainer: Any = None
    task: Any = None
    data: Any = None
    config: Config = field(default_factory=dict)
    had_parameters: bool = False  # before configure_model

    def __hash__(self) -> int:
        return id(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        step = pl_module.training_step

        @functools.wraps(inspect.unwrap(step))  # Lightning inspects the signature
        def recorded(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self.check_sum and not self.halves:
                half = len(batch.index) // 2
                for part in (batch, slice_rows(batch, 0, half), slice_rows(batch, half, None)):
                    with torch.no_grad():  # the class's own method: bigmodel's wrapper counts
                        self.halves.append(
                            _sum_and_count(type(pl_module).training_step(pl_module, part, *args, **kwargs))
                        )
            output = step(batch, *args, **kwargs)
            if self.output is None:
                self.batch, self.output = batch, output
            loss: Any = output.get("loss") if isinstance(output, dict) else output
            self.losses.append(float(loss.detach()) if loss is not None else float("nan"))
            return output

        pl_module.training_step = recorded  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("training_step", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.dropout:
            _disable_dropout(pl_module)
        resume = get_callback(trainer, Resume)
        assert resume is not None
        resume.seed = self.seed  # the weights are already initialized
        self.start, self._step = _copy_parameters(pl_module), trainer.global_step
        self.taken.append([])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.taken[-1] += batch.index.tolist() if hasattr(batch, "index") and isinstance(batch.index, Tensor) else []
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step < STEPS:
            self.taken.append([])
        if self.saves and self._step in (STOPPED_AT, STEPS):
            path = Path(str(run.directory(trainer))) / "checkpoints" / f"last-{self._step}.ckpt"
            trainer.save_checkpoint(path)
            self.checkpoints.append(path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end = _copy_parameters(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.evaluated += batch.index[batch.weight > 0].tolist()


def _sum_and_count(output: Any) -> tuple[float, float]:
    if not isinstance(output, dict):
        return float(output), float("nan")
    return float(output["loss"]), float(output.get("count", float("nan")))


def _disable_dropout(task: nn.Module) -> None:
    """Set all floats with a dropout name to 0, and the rates of dropout modules."""
    for module in task.modules():
        is_dropout = "drop" in type(module).__name__.lower()
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (is_dropout and name in ("p", "rate"))):
                setattr(module, name, 0.0)


def _copy_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: _gather(p.detach()).clone().float() for name, p in module.named_parameters() if p.requires_grad}


def _gather(tensor: Any) -> Tensor:
    """Return a sharded parameter whole, on each process."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def distance(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return the distance of two trained nets, relative to the distance of the first from the start (2-norms)."""
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    change = sum(float((a[name] - start[name]).double().square().sum()) for name in a)
    if not difference < float("inf"):
        return float("inf")
    return (difference / change) ** 0.5 if change else float(difference > 0)


def resumable_state(checkpoint: Path) -> dict[str, Any]:
    """Return the parts of a checkpoint that must be equal in a resumed run."""
    content = read(checkpoint)
    return {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
