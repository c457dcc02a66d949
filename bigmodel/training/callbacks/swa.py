"""Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407).

The equal mean of weights over the last part of a run is evaluated and saved in addition to the live weights. Running
statistics of BatchNorm are not weights: the statistics of the mean net differ from the mean of the statistics. They are
recomputed over training batches (section 3.2), before the average is evaluated or saved, if it has changed since.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bigmodel.data.sampling import Loader
from bigmodel.data.schedule import num_steps
from bigmodel.internals import prepare_batch
from bigmodel.training.callbacks.averaging import WeightAverage, tensors


class SWA(WeightAverage):
    """Averages the weights at certain optimizer steps, with equal weight, and evaluates the average.

    Training of the live weights does not change. The learning rate is set by --model.schedule: the paper keeps it high
    and constant, or cyclic, while averaging; under a schedule that falls to 0 the averaged weights hardly differ.
    `state_dict` in a checkpoint holds the live weights, so that training resumes exactly; `bigmodel.load` uses the
    average if there is one.

    Args:
        start_fraction: the fraction of the run's optimizer steps, 0 to 1, after which weights are averaged; before it
            the live ones are evaluated.
        every_n_steps: optimizer steps between two updates of the average; null: at the end of each epoch.
        num_bn_batches: micro-batches of each process, from the beginning of the first epoch's order, over which the
            statistics of BatchNorm are computed, with the task's `features(batch)` and `logits(features)`; 0: use their
            mean over the run. Unused for a net without BatchNorm.

    Raises:
        ValueError: for a setting out of range, a run without an end, or one in which no weights would be averaged.
    """

    def __init__(
        self, start_fraction: float = 0.75, every_n_steps: int | None = None, num_bn_batches: int = 100
    ) -> None:
        super().__init__()
        if not 0 <= start_fraction <= 1:
            raise ValueError(f"--callbacks.swa.start_fraction {start_fraction} must be in [0, 1]")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"--callbacks.swa.every_n_steps {every_n_steps} must be at least 1, or null for every epoch"
            )
        if num_bn_batches < 0:
            raise ValueError(f"--callbacks.swa.num_bn_batches {num_bn_batches} must be at least 0")
        self.start_fraction, self.every_n_steps, self.num_bn_batches = start_fraction, every_n_steps, num_bn_batches
        self.num_averaged = 0
        self._step = self._first = self._every = 0
        self._stale = False  # BatchNorm's statistics do not belong to the current average
        self._modes: dict[nn.Module, bool] = {}  # the modules' training flags at the last update

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.num_bn_batches and _batch_norms(pl_module) and not hasattr(pl_module, "features"):
            raise ValueError(
                f"the net has BatchNorm, whose statistics are computed for averaged weights with the methods"
                f" `features(batch)` and `logits(features)`, which {type(pl_module).__name__} lacks; with"
                " --callbacks.swa.num_bn_batches 0 they are averaged instead"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = num_steps(trainer)
        epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        if total < 0 or (self.every_n_steps is None and epoch == math.inf):
            raise ValueError(
                f"--callbacks.swa.start_fraction {self.start_fraction} needs a run of limited length: set"
                " --trainer.max_steps or --trainer.max_epochs, and --callbacks.swa.every_n_steps for data without epochs"
            )
        self._first = max(1, round(self.start_fraction * total))
        self._every = self.every_n_steps or math.ceil(epoch)
        if self.every_n_steps is None and total // self._every * self._every < self._first:
            raise ValueError(
                f"--callbacks.swa.start_fraction {self.start_fraction}: no weights would be averaged, because no epoch of"
                f" {self._every:,} optimizer steps ends from step {self._first:,} to step {total:,}; set"
                " --callbacks.swa.every_n_steps"
            )
        if trainer.global_step < self._first:  # the run was shorter when it was stopped
            self.average, self.num_averaged = {}, 0
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # accumulating
            return
        self._step = step
        from_step = 0 if self.every_n_steps is None else self._first  # epochs are counted from the run's first step
        if step < self._first or (step - from_step) % self._every:
            return
        if not self.average:
            self.average = {name: tensor.clone() for name, tensor in tensors(pl_module).items()}
        self._move(pl_module, 1 / (self.num_averaged + 1))
        self.num_averaged += 1
        self._stale = True
        self._modes = {module: module.training for module in pl_module.modules()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._refresh(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The checkpoint already refers to these tensors, which are updated in place.
        if self._stale:
            self._swap(pl_module)
            self._refresh(trainer, pl_module)
            self._swap(pl_module)

    @torch.no_grad()
    def _refresh(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recompute BatchNorm's statistics for the average, which is swapped in, if it has changed.

        As torch.optim.swa_utils.update_bn: each statistic is the mean over the batches' statistics.
        """
        norms = [norm for norm in _batch_norms(pl_module) if self._modes.get(norm)]  # frozen ones do not change
        if not self._stale or not norms or not self.num_bn_batches:
            self._stale = False
            return
        momenta = [norm.momentum for norm in norms]
        task: Any = pl_module
        run_as_step = getattr(trainer.strategy, "run_as_step", lambda function: function())
        with self._as_in_training(trainer, pl_module):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            for batch in _first_batches(trainer, pl_module, self.num_bn_batches):
                with trainer.precision_plugin.train_step_context():
                    run_as_step(lambda batch=batch: task.logits(task.features(batch)))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                if trainer.world_size > 1:
                    for statistic in (norm.running_mean, norm.running_var):
                        assert statistic is not None
                        statistic.copy_(trainer.strategy.reduce(statistic.clone(), reduce_op="mean"))
        self._stale = False

    @contextmanager
    def _as_in_training(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Put modules and trainer in the state of a training step; restore them, and the random state, at the end."""
        modes, stage = {module: module.training for module in pl_module.modules()}, trainer.state.stage
        with isolate_rng():
            torch.manual_seed(0)  # for dropout
            try:
                trainer.state.stage = RunningStage.TRAINING
                for module in modes:
                    module.training = self._modes.get(module, module.training)
                yield
            finally:
                trainer.state.stage = stage
                for module, mode in modes.items():
                    module.training = mode

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "num_averaged": self.num_averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.num_averaged = state_dict["num_averaged"]


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def _first_batches(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Any]:
    """Yield the first training micro-batches of this process, as in a training step; independent of the run's position."""
    source: Any = getattr(trainer, "datamodule", None) or pl_module
    loader = source.train_dataloader()  # a new one: the run's own loader is in the middle of its epoch
    if isinstance(loader, Loader):
        order: Any = loader.order
        order.trainer = None  # else the loader would start at the trainer's step
    for batch in islice(loader, count):
        batch = trainer.precision_plugin.convert_input(batch)
        yield trainer.strategy.batch_to_device(prepare_batch(pl_module, batch))
