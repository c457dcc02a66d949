"""Gradual unfreezing: the head trains first, then one more layer at a time, from the top.

Source: Howard and Ruder 2018 (ULMFiT, arXiv 1801.06146, section 3.3). L layers of the backbone, by `backbone.layer_of`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from bigmodel.data.sampling import data_parallel_size
from bigmodel.data.schedule import num_steps
from bigmodel.tasks.transfer_learning.methods.base import Method, Named, freeze

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning


class GradualUnfreezing(Method):
    """Trains the head first, and unfreezes layers of the backbone from the top, each at its optimizer step.

    Every parameter that will train is in the optimizer from the start, once; while it is frozen it has no gradient, so
    that the optimizer stores no state for it and does not decay it. Modules above the top layer are unfrozen with it;
    the embeddings, or the stem, come last. The set of unfrozen layers is a function of the optimizer step alone, so
    resuming is exact.

    Args:
        at: when the next layers are unfrozen: an optimizer step (1, 2, ...), or a share of the run (below 1). One entry
            for each time; layers without an entry stay frozen. Null: evenly over the first half of the run, until all
            train.
        layers_at_once: number of layers to unfreeze each time.

    Raises:
        ValueError: entries that do not rise, more of them than the backbone has layers for, shares of a run without an end,
            or a strategy that shards the net.
    """

    by_layer = True

    def __init__(self, at: list[float] | None = None, layers_at_once: int = 1) -> None:
        if layers_at_once < 1:
            raise ValueError(f"--model.method.layers_at_once {layers_at_once} must be at least 1")
        if at is not None and any(not moment > 0 or (moment >= 1 and moment != int(moment)) for moment in at):
            raise ValueError(f"--model.method.at {at}: each must be an optimizer step (1, 2, ...) or a share below 1")
        self.at, self.layers_at_once = at, layers_at_once
        self.stages: list[list[nn.Parameter]] = []  # parameters of the backbone, in the order of unfreezing

    def wrap(self, net: Any, problem_type: str) -> None:
        backbone = net.backbone
        top = backbone.num_layers
        num_stages = math.ceil((top + 1) / self.layers_at_once)
        if self.at is not None and len(self.at) > num_stages:
            raise ValueError(
                f"--model.method.at has {len(self.at)} entries; this backbone of {top} layers and embeddings (or stem),"
                f" {self.layers_at_once} at a time, accepts at most {num_stages}"
            )
        stages: list[list[nn.Parameter]] = [[] for _ in range(num_stages)]
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad:  # parameters that the net itself freezes stay frozen
                below_top = top - min(backbone.layer_of(name), top)
                stages[below_top // self.layers_at_once].append(parameter)
        self.stages = stages if self.at is None else stages[: len(self.at)]
        freeze(backbone)

    def trainable(self, net: nn.Module) -> Named:
        later = {id(parameter) for stage in self.stages for parameter in stage}
        return [(name, p) for name, p in net.named_parameters() if p.requires_grad or id(p) in later]

    def unfreeze_schedule(self, net: Any, num_steps: int) -> dict[int, int]:
        top = net.backbone.num_layers
        steps = self.stage_steps(num_steps)
        stages = {layer: (top - min(layer, top)) // self.layers_at_once for layer in range(top + 2)}
        return {layer: steps[stage] for layer, stage in stages.items() if stage < len(steps)}

    def stage_steps(self, num_steps: int) -> list[int]:
        """Return the optimizer step (from 0) at which each stage is unfrozen, in a run of so many steps (-1: no end)."""
        number = len(self.stages)
        at = self.at if self.at is not None else [0.5 * (i + 1) / number for i in range(number)]
        if num_steps < 0 and any(moment < 1 for moment in at):
            raise ValueError(
                "--model.method gradual: shares of the run require a run with an end: set --trainer.max_steps or"
                " --trainer.max_epochs, or give optimizer steps as --model.method.at"
            )
        steps = [int(moment) if moment >= 1 else math.ceil(moment * num_steps) for moment in at]
        if sorted(set(at)) != list(at) or sorted(steps) != steps:
            raise ValueError(f"--model.method.at {at} (optimizer steps {steps}) must rise from entry to entry")
        return steps

    def callbacks(self, task: TransferLearning) -> list[Callback]:
        return [UnfreezeLayers(self, task)]


class UnfreezeLayers(Callback):
    """Unfreezes the stages of `GradualUnfreezing` at their optimizer steps.

    Args:
        method: has the stages.
        task: the task whose net is trained.
    """

    def __init__(self, method: GradualUnfreezing, task: TransferLearning) -> None:
        self.method, self.task = method, task
        self.steps: list[int] = []  # the step of each stage
        self.num_open = 0
        self._last_of_step = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "--model.method gradual: FSDP2 fixes at the start which parameters have gradients; set --trainer.strategy"
                " ddp, or --model.method full with --model.layer_decay"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.steps = self.method.stage_steps(num_steps(trainer))
        self._unfreeze(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._last_of_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.num_open < len(self.steps) and trainer.global_step >= self.steps[self.num_open]:
            self._unfreeze(trainer.global_step)

    def _unfreeze(self, step: int) -> None:
        """Unfreeze the parameters that train at this step."""
        self.num_open = sum(start <= step for start in self.steps)
        for stage in self.method.stages[: self.num_open]:
            for parameter in stage:
                parameter.requires_grad_(True)
        self.task.train()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the gradients of unfrozen layers: DDP was built when only the head trained."""
        if self.num_open == 0 or not self._last_of_step or data_parallel_size(trainer) == 1:
            return
        grads = [p.grad for stage in self.method.stages[: self.num_open] for p in stage if p.grad is not None]
        if not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= data_parallel_size(trainer)
        torch._foreach_copy_(
            grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
        )
