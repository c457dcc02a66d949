"""Detection and handling of non-finite losses and gradients, and of loss spikes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from bigmodel.data.sampling import Loader
from bigmodel.data.schedule import DataPosition
from bigmodel.parallel.tensors import total_norm
from bigmodel.training.callbacks.gradient_scaling import GradientScaling, get_callback
from bigmodel.training.callbacks.resume import Resume

Action = Literal["stop", "skip", "rollback", "ignore"]
_SAMPLES_SHOWN = 32


class RollbackRequested(BaseException):
    """Raised to end `Trainer.fit` so that the run returns to a checkpoint. Not an Exception: the command continues.

    Attributes:
        step: the optimizer step with the anomaly.
        beyond: the position in the data after that step.
    """

    def __init__(self, message: str, step: int, beyond: DataPosition) -> None:
        super().__init__(message)
        self.step, self.beyond = step, beyond


@dataclass
class _Step:
    """Loss and gradient norm of an optimizer step, [2] float32, possibly still being copied to the host."""

    number: int
    values: Tensor
    limit: float  # above it, the loss is a spike
    samples: list[Tensor]  # on this process
    arrived: Any = None  # an event in the device's stream; None: already on the host
    cached: tuple[float, float] | None = field(default=None, init=False)

    def numbers(self) -> tuple[float, float]:
        """Return loss and gradient norm; waits for the device to compute them."""
        if self.cached is None:
            if self.arrived is not None:
                self.arrived.synchronize()
            loss, norm = self.values.tolist()
            self.cached = loss, norm
        return self.cached


class Anomalies(Callback):
    """Monitors the loss (mean over all predicted elements, all processes) and the gradient norm of each optimizer step.

    An anomaly is a non-finite loss or norm, or a spike: a finite loss that exceeds the mean of the last `window` steps by
    more than `spike_threshold_std` standard deviations. Each is printed on one line with its samples, and
    `train/anomalies` (the number so far) is logged. The possible actions are:

    * `stop`: raise `FloatingPointError`, which names step and samples. No checkpoint of the affected weights is
      written.
    * `skip`: skip the optimizer's step: weights and optimizer state stay bitwise unchanged, including weight decay.
      Position in the data, step number and schedule advance as usual. Running statistics of BatchNorm already include
      the batch.
    * `rollback`: return to the newest checkpoint before that step (`bigmodel fit` does so automatically), and skip the
      samples between that checkpoint and the end of the step: step number, schedule and optimizer continue from the
      checkpoint, the data from after the step (as Chowdhery et al. 2022, PaLM, section 5.1: a spike did not recur from
      an earlier state with other samples). This costs the steps since that checkpoint; the interval of the `last`
      callback determines how many. `run.json` lists each rollback under `returns`, and a run that is killed after one
      resumes to the same result, bitwise. A run bounded by epochs gets correspondingly fewer steps; validations that
      were due in the skipped steps are not repeated. After `max_rollbacks` of them, or without a checkpoint to return
      to, the action is `stop`.
    * `ignore`: do nothing.

    On a GPU the check does not wait for the current step: a step is checked after the next one has been queued, and a
    fused optimizer reads on the device whether to skip. Only `skip` with a non-fused optimizer reads each step's values
    first. On a CPU `stop` takes effect before the weights change. With float16 (`16-mixed`) the gradient scaler already
    skips steps with non-finite gradients, so only the loss is monitored here.

    Args:
        on_nonfinite: the action for a non-finite loss or norm.
        on_spike: the action for a loss spike.
        spike_threshold_std: number of standard deviations above the mean that defines a spike.
        window: optimizer steps over which mean and deviation are computed; spikes are not detected before that many
            steps.
        max_rollbacks: the maximum number of rollbacks in a run.

    Attributes:
        count: anomalies so far.
    """

    def __init__(
        self,
        on_nonfinite: Action = "stop",
        on_spike: Action = "ignore",
        spike_threshold_std: float = 6.0,
        window: int = 100,
        max_rollbacks: int = 3,
    ) -> None:
        if spike_threshold_std <= 0:
            raise ValueError(f"--callbacks.anomalies.spike_threshold_std {spike_threshold_std} must be above 0")
        if window < 2:
            raise ValueError(f"--callbacks.anomalies.window {window} must be at least 2 optimizer steps")
        if max_rollbacks < 1:
            raise ValueError(
                f"--callbacks.anomalies.max_rollbacks {max_rollbacks} must be at least 1; for none, set on_nonfinite and"
                " on_spike to stop, skip or ignore"
            )
        self.on_nonfinite, self.on_spike = on_nonfinite, on_spike
        self.spike_threshold_std, self.max_rollbacks = spike_threshold_std, max_rollbacks
        self.count = 0
        self._logged = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._latest: _Step | None = None  # not yet checked
        self._samples: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gradients = get_callback(trainer, GradientScaling)
        if gradients is None:
            raise ValueError("Anomalies reads loss and gradient norm from GradientScaling: add that callback before it")
        self._gradients = gradients
        plugin = trainer.precision_plugin
        self._scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        self._samples = []
        if "rollback" in (self.on_nonfinite, self.on_spike):
            self._resume = get_callback(trainer, Resume)
            if self._resume is None or not isinstance(trainer.train_dataloader, Loader):
                raise ValueError(
                    f"a rollback skips samples, which a {type(trainer.train_dataloader).__name__} cannot: make the training"
                    " loader with bigmodel.data.sampling.train_loader, or set --callbacks.anomalies.on_nonfinite and"
                    " on_spike to stop, skip or ignore"
                )
            self.count += self._resume.new_returns  # the checkpoint does not include anomalies after it

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        index = batch.get("index") if isinstance(batch, Mapping) else getattr(batch, "index", None)
        if isinstance(index, Tensor):  # `index` of a list or a tuple is a method
            self._samples.append(index)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._check(trainer)  # the previous step: always here, so that a resumed run has the same limits
        loss, samples = self._gradients.loss, self._samples
        self._samples = []
        if loss is None:
            return
        limit = self._limit()
        values = torch.stack([loss.float(), self._norm(optimizer, loss.device)])
        if "skip" in (self.on_nonfinite, self.on_spike):
            _skip(optimizer, self._to_skip(values, limit))
        step = _Step(trainer.global_step + 1, values, limit, samples)
        if values.device.type != "cpu":
            step.values = values.to("cpu", non_blocking=True)
            step.arrived = torch.get_device_module(values.device).Event()
            step.arrived.record()
        self._latest = step
        if step.arrived is None:
            self._check_if_fatal(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not in `_check`: a run resumed from the previous checkpoint would find that row and write it again.
        if self.count > self._logged:
            self._log_count(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_if_fatal(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_if_fatal(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)
        if self.count > self._logged:
            self._log_count(trainer)

    def _log_count(self, trainer: Trainer) -> None:
        self._logged = self.count
        for logger in trainer.loggers:
            logger.log_metrics({"train/anomalies": self.count}, step=trainer.global_step)

    def _norm(self, optimizer: Optimizer, device: torch.device) -> Tensor:
        """Return the 2-norm of the gradient, taken from GradientScaling if it clips; 0 if a gradient scaler is used."""
        if self._scaled:
            return torch.zeros((), device=device)
        if self._gradients.grad_norm is not None:
            return self._gradients.grad_norm.float()
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return total_norm(grads).float()

    def _limit(self) -> float:
        n = len(self._losses)
        if n < (self._losses.maxlen or 0):
            return math.inf
        mean = sum(self._losses) / n
        return mean + self.spike_threshold_std * math.sqrt(sum((loss - mean) ** 2 for loss in self._losses) / n)

    def _to_skip(self, values: Tensor, limit: float) -> Tensor:
        """True, as a bool tensor on the device, if this step should be skipped."""
        finite = values.isfinite().all()
        spike = finite & (values[0] > limit)
        if self.on_nonfinite == self.on_spike:
            return ~finite | spike
        return ~finite if self.on_nonfinite == "skip" else spike

    def _action(self, step: _Step) -> Action | None:
        loss, norm = step.numbers()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self.on_nonfinite
        return self.on_spike if loss > step.limit else None

    def _check_if_fatal(self, trainer: Trainer) -> None:
        """Check the latest step now if its action ends this fit; otherwise leave it for the regular check."""
        if self._latest is not None and self._action(self._latest) in ("stop", "rollback"):
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        step, self._latest = self._latest, None
        if step is None:
            return
        action = self._action(step)
        loss, norm = step.numbers()
        mean = sum(self._losses) / max(1, len(self._losses))
        if math.isfinite(loss):
            self._losses.append(loss)
        self.count += action is not None
        if action is None:
            return
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}: not finite"
        if math.isfinite(loss) and math.isfinite(norm):
            what = (
                f"loss {loss:.4g} is above {step.limit:.4g} (mean {mean:.4g} of the last {self._losses.maxlen} steps)"
            )
        message = f"optimizer step {step.number:,}: {what}{_format_samples(trainer, step.samples)}"
        if action == "rollback":
            self._roll_back(trainer, step, message)
        if action == "stop":
            self._log_count(trainer)
            flag = "on_spike" if math.isfinite(loss) and math.isfinite(norm) else "on_nonfinite"
            raise FloatingPointError(f"{message}. --callbacks.anomalies.{flag} skip leaves out such steps")
        if trainer.is_global_zero:
            print(f"{message}{'; skipped' if action == 'skip' else ''}", flush=True)

    def _roll_back(self, trainer: Trainer, step: _Step, message: str) -> None:
        loader = trainer.train_dataloader
        assert self._resume is not None
        assert isinstance(loader, Loader)
        assert loader.schedule is not None
        if self._resume.num_returns >= self.max_rollbacks:
            raise FloatingPointError(
                f"{message}. The run has had {self._resume.num_returns} rollbacks, and"
                f" --callbacks.anomalies.max_rollbacks is {self.max_rollbacks}"
            )
        raise RollbackRequested(message, step.number, loader.schedule.at(step.number))

    def state_dict(self) -> dict[str, Any]:
        step = self._latest
        latest = None
        if step is not None:
            samples = [index.tolist() for index in step.samples]
            latest = {"number": step.number, "values": step.numbers(), "limit": step.limit, "samples": samples}
        return {"count": self.count, "logged": self._logged, "losses": list(self._losses), "latest": latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        self._logged = state_dict.get("logged", self.count)
        self._losses.extend(state_dict["losses"])
        if (latest := state_dict["latest"]) is not None:
            samples = [torch.tensor(index) for index in latest["samples"]]
            self._latest = _Step(latest["number"], torch.tensor(latest["values"]), latest["limit"], samples)


def _skip(optimizer: Optimizer, condition: Tensor) -> None:
    """Make the optimizer skip this step if the condition (bool, no dimension) is true."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if fused and optimizer.state:  # at its first step, fused SGD would read a momentum buffer that it has not written
        optimizer.found_inf = condition.float()  # type: ignore[attr-defined]
    elif bool(condition):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # every torch optimizer skips parameters without a gradient


def _format_samples(trainer: Trainer, samples: list[Tensor]) -> str:
    """Format the step's samples over all processes; every process must call this with the same number of samples."""
    if not samples:
        return ""
    numbers = torch.cat([index.reshape(-1) for index in samples]).to(trainer.strategy.root_device)
    if trainer.world_size > 1:
        numbers = trainer.strategy.all_gather(numbers)
    shown = numbers.reshape(-1).tolist()
    more = f" and {len(shown) - _SAMPLES_SHOWN:,} more" if len(shown) > _SAMPLES_SHOWN else ""
    return f"; samples {', '.join(map(str, shown[:_SAMPLES_SHOWN]))}{more}"
