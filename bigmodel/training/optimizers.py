"""Parameter groups, the optimizer and its learning-rate scheduler, for a task's `configure_optimizers`.

Weight decay is not applied to biases, norms and other vectors, as is usual for transformers. Gradients are scaled and
clipped in `bigmodel.training.callbacks.gradient_scaling`; the schedules are in `bigmodel.training.schedules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bigmodel.data.schedule import num_steps
from bigmodel.internals import disable_fused, set_scheduler_position
from bigmodel.training.schedules import Constant, Schedule

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: matrices, with weight decay, and vectors (biases, norms), without.

    Each parameter is in one group once, tied ones included. Empty groups are left out.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim >= 2]
    exempt = [p for p in trainable if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class _StepSchedule(LambdaLR):
    """Restores only the position: base rates and shape come from the configuration, so explicit flags take precedence."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule, trainer: Trainer) -> None:
        self.trainer, self.total = trainer, num_steps(trainer)
        super().__init__(optimizer, lambda step: schedule(step, self.total))

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key not in ("trainer", "total")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = num_steps(self.trainer)  # differs after a resume with another batch size
        step = state_dict["last_epoch"]
        rates = [base * factor(step) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        set_scheduler_position(self, step, state_dict["_step_count"], rates)


def _without(groups: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key not in keys} for group in groups]


def _drop_missing_fused(built: Optimizer, optimizer: OptimizerFactory) -> None:
    """Set `fused` to false, and print a line, if torch has no fused kernel of this optimizer for its parameters.

    The supported combinations (not SGD of sharded parameters, for example) depend on the version: each kind of
    parameter is tried.
    """
    kinds: dict[Any, Tensor] = {}  # the smallest parameter of each kind
    for group in built.param_groups:
        for p in group["params"] if group.get("fused") else ():
            kind = (p.device, p.dtype, (p.device_mesh, p.placements) if isinstance(p, DTensor) else None)
            if p.device.type != "meta" and (kind not in kinds or p.numel() < kinds[kind].numel()):
                kinds[kind] = p
    missing = [p for p in kinds.values() if not _steps(optimizer, p)]
    if not missing:
        return
    disable_fused(built)
    p = missing[0]
    kind_of = f"{'sharded ' if isinstance(p, DTensor) else ''}parameters in {str(p.dtype)[6:]} on {p.device.type}"
    rank_zero_only(print)(
        f"--model.optimizer.fused true: torch {torch.__version__} has no fused {type(built).__name__} for {kind_of}; the"
        " ordinary one is used, with equal results up to rounding",
        flush=True,
    )


def _steps(optimizer: OptimizerFactory, parameter: Tensor) -> bool:
    """True if the optimizer can take a step on a parameter like this one."""
    trial = torch.zeros_like(parameter.detach()).requires_grad_()
    trial.grad = torch.zeros_like(trial)
    try:
        optimizer([trial]).step()
    except RuntimeError:  # includes NotImplementedError
        return False
    return True


def configure(
    module: LightningModule,
    optimizer: OptimizerFactory,
    schedule: Schedule | None = None,
    groups: Iterable[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return the value for a task's `configure_optimizers`.

    When a run is resumed, the optimizer's state and the position in the schedule come from the checkpoint, and every
    setting (learning rate, betas, weight decay) from the configuration.

    Args:
        module: the task; its trainable parameters are grouped by `parameter_groups`, unless `groups` are given.
        optimizer: creates the optimizer from parameter groups, for example `functools.partial(torch.optim.AdamW,
            lr=1e-3)`. If torch has no fused kernel of it, `fused` is set to false, and a line is printed.
        schedule: the learning rate over the run's steps; None: constant.
        groups: the task's own parameter groups, in place of `parameter_groups`; in addition to the optimizer's settings
            a group may have `rate`, the factor applied to its learning rate.

    Raises:
        ValueError: if no parameter is trainable, or a schedule needs the number of steps and the run is unbounded.
    """
    chosen = parameter_groups(module) if groups is None else list(groups)
    if not chosen:
        raise ValueError(f"{type(module).__name__} has no trainable parameter, which an optimizer needs")
    built = optimizer(_without(chosen, "rate"))
    if "weight_decay" not in built.defaults:  # an optimizer without weight decay would store the key unused
        if groups is None:
            built = optimizer([p for group in chosen for p in group["params"]])
        else:
            built = optimizer(_without(chosen, "rate", "weight_decay"))
    _drop_missing_fused(built, optimizer)
    if groups is not None:
        for group, given in zip(built.param_groups, chosen, strict=True):
            group["lr"] *= given.get("rate", 1.0)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in built.param_groups]

    def keep_settings(loaded: Optimizer) -> None:
        for group, own in zip(loaded.param_groups, settings, strict=True):
            group.update(own)

    built.register_load_state_dict_post_hook(keep_settings)
    if schedule is None:
        return {"optimizer": built}
    total = num_steps(module.trainer)
    if total < 0 and type(schedule) is not Constant:
        raise ValueError(
            f"--model.schedule {type(schedule).__name__} needs a run of limited length: set --trainer.max_steps or"
            " --trainer.max_epochs"
        )
    scheduler = _StepSchedule(built, schedule, module.trainer)
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
