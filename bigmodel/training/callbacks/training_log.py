"""Logging of training for any task, without code in the task: loss, learning rate, speed, hardware utilisation.

MFU is model FLOPs utilisation (Chowdhery et al. 2022, PaLM): FLOPs per second over the device's peak. The FLOPs are
counted on the first micro-batch, forward and backward, not declared. They are those of the trained net: recomputation
of checkpointed activations is not counted, nor is computation under `outside_mfu` (a teacher, generation of training
text), although its time is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from bigmodel.data.sampling import Loader, data_parallel_rank, data_parallel_size
from bigmodel.data.schedule import training_steps
from bigmodel.parallel.float8 import Float8
from bigmodel.training.callbacks.gradient_scaling import GradientScaling, get_callback
from bigmodel.training.machine import peak_flops


class TrainingLog(Callback):
    """Logs training every `trainer.log_every_n_steps` optimizer steps, over the steps since the last row.

    `train/loss` (mean over all predicted elements, all processes), `train/lr`, `train/grad_norm` (when clipping); if a
    training step returns `parts`, sums by name in addition to its loss, also their means as `train/<name>`;
    `speed/samples_per_s` and, if the task counts, `speed/<count_unit>_per_s` (all processes); `speed/mfu` (0 to 1, per
    device, if its peak is known); `seen/samples`, `seen/<count_unit>`. Time in validation is excluded. The task's attribute
    `count_unit` names the unit of its count, for example `count_unit = "tokens"`. Between rows nothing is read from the
    device.

    Args:
        mfu: count the FLOPs of the trained net on the first micro-batch, and log `speed/mfu`: their rate over the peak
            of the type in which matrix products are computed (`bigmodel.training.machine.peak_flops`).

    Attributes:
        latest: the last row.
        extra_metrics: functions that add metrics to each row; called on all processes.
    """

    def __init__(self, mfu: bool = True) -> None:
        self.mfu = mfu
        self.latest: dict[str, float] = {}
        self.extra_metrics: list[Callable[[Trainer], dict[str, float]]] = []
        self._peak: float | None = None  # FLOP/s
        self._flops: int | None = None  # of one micro-batch on one device, forward and backward
        self._counter: _FlopCounter | None = None
        self._paused = self._pause_start = 0.0
        self._trainer: Trainer | None = None
        self._restored: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gradients = get_callback(trainer, GradientScaling)
        self._count_unit = str(getattr(pl_module, "count_unit", "samples"))
        self._batch_size = samples_per_step(trainer)
        settings: Any = trainer
        self._every = settings.log_every_n_steps
        self._peak = peak_flops(pl_module.device, _compute_dtype(trainer)) if self.mfu else None
        self._first = training_steps(trainer)
        self._step, self._count = training_steps(trainer), self._total_count()
        self._sums: dict[str, Tensor] = {}  # since the last row
        self._micro_batches = 0
        self._trainer = trainer
        if self._restored:
            self._restore(trainer, pl_module.device)
        self._start_clock()

    def state_dict(self) -> dict[str, Any]:
        """Losses since the last row, [W] on W processes that take different samples.

        With these, the first row after a resume equals that of an uninterrupted run.
        """
        if self._trainer is None:
            return self._restored
        every = self._trainer.world_size // data_parallel_size(self._trainer)
        gather = self._trainer.strategy.all_gather
        sums = {name: gather(value).reshape(-1)[::every] for name, value in self._sums.items()}
        accumulation = self._trainer.accumulate_grad_batches
        return {"step": self._step, "count": self._count, "sums": sums, "accumulation": accumulation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _restore(self, trainer: Trainer, device: torch.device) -> None:
        state, self._restored = self._restored, {}
        self._step, self._count = state["step"], state["count"]
        for name, sums in state.get("sums", {}).items():
            same = len(sums) == data_parallel_size(trainer)  # else each process gets an equal share
            own = sums[data_parallel_rank(trainer)] if same else sums.sum() / data_parallel_size(trainer)
            scale = state["accumulation"] / trainer.accumulate_grad_batches if name == "loss" else 1
            self._sums[name] = own.to(device) * scale

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.mfu and self._flops is None:
            self._stop_counting()  # of a batch that had no backward pass
            if "torch._dynamo" in sys.modules:  # operations in compiled code cannot be counted
                torch.compiler.set_stance("force_eager")
            self._counter = _FlopCounter()
            self._counter.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._counter is not None:
            self._flops = self._counter.flops
            self._stop_counting()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counter is None:
            return
        self._counter.__exit__(None, None, None)
        self._counter = None
        if "torch._dynamo" in sys.modules:
            torch.compiler.set_stance("default")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs.get("loss") is not None:
            for name, value in {"loss": outputs["loss"], **outputs.get("parts", {})}.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._micro_batches += 1
        if self._micro_batches % trainer.accumulate_grad_batches:
            return
        step = training_steps(trainer)
        if step == self._first + 1:  # counting and warm-up are over: start the clock
            self._start_clock()
        if step % self._every == 0:
            self._log(trainer, step)

    def _log(self, trainer: Trainer, step: int) -> None:
        row: dict[str, float] = {}
        accumulation, count = trainer.accumulate_grad_batches, self._total_count()
        predicted = count - self._count or (step - self._step) * accumulation * data_parallel_size(trainer)
        for name, value in self._sums.items():
            scale = accumulation if name == "loss" else 1  # Lightning has divided the loss by it
            total = float(trainer.strategy.reduce(value * scale, reduce_op="sum"))
            total *= data_parallel_size(trainer) / trainer.world_size  # processes that share a model have equal values
            row[f"train/{name}"] = total / predicted
        if trainer.optimizers:
            row["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        if self._gradients is not None and self._gradients.grad_norm is not None:
            row["train/grad_norm"] = float(self._gradients.grad_norm)
        seconds = time.perf_counter() - self._start - self._paused
        steps = step - max(self._step, self._first + 1)
        if steps > 0 and seconds > 0:
            row["speed/samples_per_s"] = steps * self._batch_size / seconds
            if count and self._count_unit != "samples":
                row[f"speed/{self._count_unit}_per_s"] = (count - self._count) * steps / (step - self._step) / seconds
            mfu = self.mfu_of(accumulation * steps, seconds)
            if mfu is not None:
                row["speed/mfu"] = mfu
        for measure in self.extra_metrics:
            row |= measure(trainer)
        row |= self.seen(trainer)
        self.latest = row
        own = trainer.callback_metrics  # logged by the module itself, under the same name
        logged = {name: value for name, value in row.items() if name not in own}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)
        self._step, self._count, self._sums, self._micro_batches = step, count, {}, 0
        self._start_clock()

    def mfu_of(self, micro_batches: int, seconds: float) -> float | None:
        """Return the MFU (0 to 1) of one device for `micro_batches` in `seconds`; None if it is unknown."""
        if not self._flops or not self._peak:
            return None
        mfu = self._flops * micro_batches / seconds / self._peak
        return mfu if mfu <= 1 else None  # above 1, the assumed peak is wrong

    def seen(self, trainer: Trainer) -> dict[str, float]:
        """Return the samples, and the elements that the task counts, consumed so far. Reads from the device."""
        loader, step = trainer.train_dataloader, training_steps(trainer)
        schedule = loader.schedule if isinstance(loader, Loader) else None
        seen: dict[str, float] = {"seen/samples": schedule.at(step).seen if schedule else step * self._batch_size}
        if self._count_unit != "samples" and (count := self._total_count()):
            seen[f"seen/{self._count_unit}"] = count
        return seen

    def _total_count(self) -> float:
        counted = self._gradients.total_count if self._gradients is not None else None
        return counted.item() if counted is not None else 0

    def _start_clock(self) -> None:
        self._start, self._paused = time.perf_counter(), 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._paused += time.perf_counter() - self._pause_start


def samples_per_step(trainer: Trainer) -> int:
    """Return the samples per optimizer step over all processes; 0 if the loader does not define it."""
    loader: Any = trainer.train_dataloader
    if isinstance(loader, Loader):
        return loader.samples_per_step
    size = getattr(loader, "batch_size", None)
    return size * data_parallel_size(trainer) * trainer.accumulate_grad_batches if isinstance(size, int) else 0


def _compute_dtype(trainer: Trainer) -> torch.dtype:
    """Return the type of the inputs of matrix products; with float8, that of the blocks' products."""
    float8 = get_callback(trainer, Float8)
    if float8 is not None and not float8.emulate:
        return torch.float8_e4m3fn
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


class _FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention inside the context.

    Unlike torch's FlopCounterMode it does not decompose operations, which would change the last bit of some results:
    counting must not change the training.
    """

    paused = False  # by `outside_mfu`

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor then calls the operation on its local tensors, which are counted
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # Gradients enabled in a backward pass: checkpointed activations are recomputed. MFU counts the FLOPs that the model
        # requires, not those that are executed (PaLM, appendix B).
        recomputed = torch.is_grad_enabled() and torch._C._current_graph_task_id() >= 0
        if recomputed or _FlopCounter.paused:
            return out
        formula: Any = _CPU_ATTENTION.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


@contextmanager
def outside_mfu() -> Iterator[None]:
    """Exclude the computation in this context from `speed/mfu`.

    For work in a training step that is not part of training the net: a teacher's forward pass, text generation.
    """
    before, _FlopCounter.paused = _FlopCounter.paused, True
    try:
        yield
    finally:
        _FlopCounter.paused = before


def _attention_flops(query: Tensor, key: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    value = args[0]
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> int:
    value = args[0]
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# Torch's formulas cover only the attention kernels of GPUs.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
