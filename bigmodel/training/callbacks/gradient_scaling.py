"""Gradient scaling once per optimizer step: to the mean over all predicted elements, followed by clipping.

A loss is a sum and a count. With A micro-batches on each of W processes (with tensor parallelism, groups of processes
that share a model), Lightning and DDP or FSDP2 leave in `.grad` the sum of all gradients divided by A·W; the required
value is the sum divided by the global count N (tokens, samples, ...). A mean of the micro-batches' means differs from
it whenever their counts differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from bigmodel.data.sampling import data_parallel_size
from bigmodel.internals import set_result_class
from bigmodel.nn.accumulation import accumulable, accumulation_dtype
from bigmodel.parallel.tensors import local, total_norm

_Kind = TypeVar("_Kind", bound=Callback)


class GradientScaling(Callback):
    """Scales and clips gradients before each optimizer step. Always on.

    If `training_step` returns `{"loss": sum, "count": number}`, gradients are scaled by the global count; if it returns
    a mean loss, they are left as Lightning computes them (a mean of means, exact for equal counts).
    `trainer.gradient_clip_val` is applied here, after scaling, so that it also works where Lightning refuses it (fused
    optimizers under bf16-mixed, and manual optimization: there the gradients of each optimizer that takes a step).

    Attributes:
        total_count: elements predicted so far over all processes, on the device, int64, or float64 if the task's counts are
            floating-point numbers (sums of weights); 0 if it returns none.
        loss: of the last step, the mean over the predicted elements of all processes, on the device; None before the
            first.
        grad_norm: 2-norm of the scaled gradients of the last step before clipping; None unless clipping is on.
    """

    def __init__(self) -> None:
        self.total_count: Tensor | None = None
        self.loss: Tensor | None = None
        self.grad_norm: Tensor | None = None
        self._count: Tensor | None = None
        self._loss: Tensor | None = None  # summed over micro-batches
        self._restored: int | float = 0
        self._clip: float | None = None
        self._stop_recording: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        clip = trainer.gradient_clip_val
        if clip is not None and not clip >= 0:
            raise ValueError(
                f"--trainer.gradient_clip_val {clip} must be above 0, the largest norm of the gradient; null (or 0) does not"
                " clip"
            )
        self._stop_recording = set_result_class(trainer, _RecordingResult(self))
        self.take_clipping(trainer, pl_module)

    def take_clipping(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clip here instead of in Lightning, unless it is by value, or the module has a clipping of its own."""
        overridden = is_overridden("configure_gradient_clipping", pl_module)
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, "norm") and not overridden:
            self._clip, trainer.gradient_clip_val = float(trainer.gradient_clip_val), None

    def record(self, output: Any) -> None:
        """Add what a micro-batch's `training_step` returned to the sums of this optimizer step."""
        if isinstance(output, Mapping) and "count" in output:
            count = torch.as_tensor(output["count"], device=output["loss"].device)
            if count.is_floating_point():  # a sum of weights, to be added up over a whole run
                count = accumulable(count)
            self._count = count.detach() if self._count is None else self._count + count.detach()
        loss: Any = output.get("loss") if isinstance(output, Mapping) else output
        if loss is not None:
            loss = loss.detach().float()
            self._loss = loss if self._loss is None else self._loss + loss

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._stop_recording is not None:
            self._stop_recording()
            self._stop_recording = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        dtype = accumulation_dtype(pl_module.device) if isinstance(self._restored, float) else torch.int64
        self.total_count = torch.tensor(self._restored, device=pl_module.device, dtype=dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scaled = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
        if scaled and any(group.get("fused") for optimizer in trainer.optimizers for group in optimizer.param_groups):
            raise ValueError(
                "a fused optimizer unscales float16 gradients only inside its own step, after they must be clipped: set"
                " --model.optimizer.fused false or --trainer.precision bf16-mixed"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        count, loss = self._count, self._loss
        self._count = self._loss = None
        replicas = data_parallel_size(trainer)
        if trainer.world_size > 1 and loss is not None:
            loss = accumulable(loss)
            sums = torch.stack([loss, torch.zeros_like(loss) if count is None else count.to(loss.dtype)])
            torch.distributed.all_reduce(sums)  # the strategy's reduce waits at a barrier each time
            sums /= trainer.world_size // replicas  # processes that share a model count the same samples
            loss, count = sums[0], None if count is None else sums[1].to(count.dtype)
        micro_batches = trainer.accumulate_grad_batches * replicas
        predicted: Tensor | int = micro_batches
        scale: Tensor | None = None
        if count is not None:
            assert self.total_count is not None
            self.total_count = self.total_count + count
            if count.is_floating_point():
                predicted = torch.where(count > 0, count, 1).to(loss.dtype if loss is not None else torch.float32)
            else:
                predicted = count.clamp(min=1)
            scale = micro_batches / predicted
        self.loss = None if loss is None else loss / predicted
        if scale is None and self._clip is None:
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return
        if self._clip is not None:
            norm = total_norm(grads)
            norm = norm if scale is None else norm * scale
            self.grad_norm = norm
            shrink = (self._clip / (norm + 1e-6)).clamp(max=1.0)
            scale = shrink if scale is None else scale * shrink
        assert scale is not None
        parts = [local(grad) for grad in grads]
        torch._foreach_mul_(parts, scale.to(parts[0].device))

    def state_dict(self) -> dict[str, Any]:
        return {"total_count": self.total_count.item() if self.total_count is not None else self._restored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["total_count"]


class _RecordingResult:
    """Stands in for Lightning's `ClosureResult`: records loss and count, then converts as Lightning does."""

    def __init__(self, scaling: GradientScaling) -> None:
        self.scaling = scaling

    def from_training_step_output(self, output: Any, normalize: int = 1) -> ClosureResult:
        self.scaling.record(output)
        return ClosureResult.from_training_step_output(output, normalize)


def get_callback(trainer: Any, kind: type[_Kind]) -> _Kind | None:
    """Return the trainer's first callback of this class, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
