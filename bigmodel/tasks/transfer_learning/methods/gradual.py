"""Gradual unfreezing: the head trains first, then one more layer at a time, from the top.

Source: Howard and Ruder 2018 (ULMFiT, arXiv 1801.06146, section 3.3). L layers of the backbone, by `backbone.layer_of`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from bigmodel.data.sampling import data_parallel_size
from bigmodel.data.schedule import num_steps
from bigmodel.tasks.transfer_learning.methods.base import Method, Named, freeze

if TYPE_CHECKING:
    from bigmodel.tasks.transfer_learning.module import TransferLearning


class Gradual(Method):
    """Trains the head first, and unfreezes layers of the backbone from the top, each at its optimizer step.

    Every parameter that will train is in the optimizer from the start, once; while it is frozen it has no gradient, so
    that the optimizer keeps no state for it and does not decay it. Modules above the top layer are unfrozen with it;
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
        self.stages: list[
            list[nn.Parameter]
        ] = []  # parameters of the backbone, in the order in which they are unfrozen
        self.steps: list[int] = []  # the step of each stage
        self.num_open = 0
        self._last_of_step = True

    def prepare(self, net: Any, problem: str) -> None:
        backbone = net.backbone
        top = backbone.num_layers
        num_stages = math.ceil((top + 1) / self.layers_at_once)
        if self.at is not None and len(self.at) > num_stages:
            raise ValueError(
                f"--model.method.at has {len(self.at)} entries, and this backbone of {top} layers and embeddings (or stem)"
                f" joins in {num_stages}, {self.layers_at_once} at a time: give at most {num_stages}"
            )
        stages: list[list[nn.Parameter]] = [[] for _ in range(num_stages)]
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad:  # parameters that the net itself freezes stay frozen
                below_top = top - min(backbone.layer_of(name), top)
                stages[below_top // self.layers_at_once].append(parameter)
        self.stages = stages if self.at is None else stages[: len(self.at)]
        freeze(backbone)
        self.num_open = 0

    def trained(self, net: nn.Module) -> Named:
        joining = {id(parameter) for stage in self.stages for parameter in stage}
        return [(name, p) for name, p in net.named_parameters() if p.requires_grad or id(p) in joining]

    def setup(self, task: TransferLearning) -> None:
        if isinstance(task.trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "--model.method gradual: FSDP2 decides once which parameters have gradients; set --trainer.strategy ddp, or"
                " choose --model.method full with --model.layer_decay"
            )

    def joins(self, task: TransferLearning) -> dict[int, int]:
        top = task.net.backbone.num_layers
        steps = self._steps(num_steps(task.trainer))
        stages = {layer: (top - min(layer, top)) // self.layers_at_once for layer in range(top + 2)}
        return {layer: steps[stage] for layer, stage in stages.items() if stage < len(steps)}

    def on_train_start(self, task: TransferLearning) -> None:
        self.steps = self._steps(num_steps(task.trainer))
        self._open(task)

    def _steps(self, total: int) -> list[int]:
        """Return the optimizer step (from 0) at which each stage is unfrozen."""
        number = len(self.stages)
        at = self.at if self.at is not None else [0.5 * (i + 1) / number for i in range(number)]
        if total < 0 and any(moment < 1 for moment in at):
            raise ValueError(
                "--model.method gradual: shares of the run need its end: set --trainer.max_steps or --trainer.max_epochs,"
                " or give optimizer steps as --model.method.at"
            )
        steps = [int(moment) if moment >= 1 else math.ceil(moment * total) for moment in at]
        if sorted(set(at)) != list(at) or sorted(steps) != steps:
            raise ValueError(f"--model.method.at {at} (optimizer steps {steps}) must rise from entry to entry")
        return steps

    def on_train_batch_start(self, task: TransferLearning, batch_idx: int) -> None:
        accumulation = task.trainer.accumulate_grad_batches
        self._last_of_step = (batch_idx + 1) % accumulation == 0
        if self.num_open < len(self.steps) and task.trainer.global_step >= self.steps[self.num_open]:
            self._open(task)

    def _open(self, task: TransferLearning) -> None:
        """Unfreeze the parameters that train at this step."""
        self.num_open = sum(step <= task.trainer.global_step for step in self.steps)
        for stage in self.stages[: self.num_open]:
            for parameter in stage:
                parameter.requires_grad_(True)
        task.train()

    def on_after_backward(self, task: TransferLearning) -> None:
        """Average the gradients of unfrozen layers: DDP was built when only the head trained."""
        if self.num_open == 0 or not self._last_of_step or data_parallel_size(task.trainer) == 1:
            return
        grads = [p.grad for stage in self.stages[: self.num_open] for p in stage if p.grad is not None]
        if not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= data_parallel_size(task.trainer)
        torch._foreach_copy_(
            grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
        )
