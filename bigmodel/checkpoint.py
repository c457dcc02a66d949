"""Weights in and out: written atomically, read as data only, and loaded strictly unless a mismatch is excused by name."""

from __future__ import annotations

import errno
import fnmatch
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from bigmodel.optim import num_steps

_STEPS_TO_AGREE = 10  # several processes agree on whether it is time to save at every tenth step only


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: a crash or a full disk leaves the earlier checkpoint as it was.

    Loading is `weights_only`: a checkpoint holds tensors and plain values, and reading one runs no code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if _disk_full(error, target.parent):
                free = shutil.disk_usage(target.parent).free
                raise OSError(
                    errno.ENOSPC,
                    f"no space to write the checkpoint ({free / 1e6:,.0f} MB free); earlier checkpoints are intact. Free"
                    " some space and go on with `bigmodel fit --resume`",
                    str(target),
                ) from error
            raise

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return read(path)


def _disk_full(error: BaseException, folder: Path) -> bool:
    """torch reports a failed write as a RuntimeError without the cause, so look at the disk as well."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 1 << 20


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The checkpoint at `path`, on the CPU, memory-mapped.

    Raises:
        ValueError: if it is missing, damaged, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read as a checkpoint (damaged, or not one): {reason}") from error
    return checkpoint


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, safe to resume from: at a step where validation is due, it saves after it.

    Args:
        monitor: the metric by which the best is kept, for example `val/loss`; None: keep the latest.
        mode: whether the best is the smallest (`min`) or largest (`max`).
        every_n_steps: optimizer steps between saves; None: see `every_n_minutes`. Without both: after each validation.
        every_n_minutes: minutes of training between saves.
        keep: how many to keep; -1 keeps all.
        filename: name of the file; `{step}` and metrics in braces are filled in.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep: int = 1,
        filename: str = "{step}",
    ) -> None:
        if monitor is not None and (every_n_steps is not None or every_n_minutes is not None):
            raise ValueError(
                f"a checkpoint that is kept by {monitor} is saved when validation has measured it: leave out every_n_steps"
                " and every_n_minutes, and set --trainer.val_check_interval"
            )
        super().__init__(
            monitor=monitor,
            mode=mode,
            every_n_train_steps=every_n_steps,
            train_time_interval=timedelta(minutes=every_n_minutes) if every_n_minutes is not None else None,
            save_top_k=keep,
            filename=filename,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )
        self._last_step = self._step = -1
        self._saved_at = 0.0
        self._on_disk: list[str] = []  # names; for a moment one more than is kept
        self._enable_version_counter = False  # a step taken again after a resume writes the same file again

    @functools.cached_property
    def state_key(self) -> str:
        """As in ModelCheckpoint, which makes this string anew whenever a hook is called, several times a step."""
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also where the run directory was moved meanwhile; checkpoints that are no longer there are forgotten."""
        folder = Path(str(self.dirpath))

        def here(path: str) -> str:
            moved = folder / Path(path).name
            return str(moved) if path and moved.exists() else ""

        best = {here(path): score for path, score in state_dict["best_k_models"].items() if here(path)}
        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})
        self._on_disk = list(state_dict.get("on_disk", []))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "on_disk": self._on_disk}

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._on_disk = [*dict.fromkeys([*self._on_disk, Path(filepath).name])]
        super()._save_checkpoint(trainer, filepath)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self._on_disk = [name for name in self._on_disk if name != Path(filepath).name]

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Lightning keeps what it was resumed from, so that every resume leaves a file more. Here that goes like any other
        when a newer one is whole."""
        return Path(previous).name != Path(current).name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_top_k > 0:  # a run killed between a write and the removal that follows left one too many
            kept = {Path(path).name for path in (*self.best_k_models, self.best_model_path)}
            for name in set(self._on_disk) - kept:
                self._remove_checkpoint(trainer, str(Path(str(self.dirpath)) / name))
        self._last_step, self._step, self._saved_at = num_steps(trainer), trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.monitor is not None or step == self._step:  # after validations only; accumulating
            return
        self._step = step
        due = step == self._last_step  # the run's end is always kept
        if self._every_n_train_steps:
            due |= step % self._every_n_train_steps == 0
        elif self._train_time_interval is not None and (trainer.world_size == 1 or step % _STEPS_TO_AGREE == 0):
            late = time.monotonic() - self._saved_at >= self._train_time_interval.total_seconds()
            due |= trainer.strategy.broadcast(late)
        if not due:
            return
        self._saved_at = time.monotonic()
        epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if fetcher is not None and epoch._should_check_val_fx(fetcher) and not epoch.val_loop.skip:
            self._defer_save_until_validation = True  # `on_validation_end` saves
        elif not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def load_weights(module: nn.Module, weights: dict[str, Tensor], excuse: Iterable[str] = ()) -> list[str]:
    """Load weights into a module strictly.

    Args:
        module: where they go.
        weights: tensors by name, as in `module.state_dict()`.
        excuse: patterns (`*` as in file names) of names that may be missing, unexpected or of another shape.

    Returns:
        The names that were excused and not loaded.

    Raises:
        ValueError: that lists every other mismatch.
    """
    own, patterns = module.state_dict(), list(excuse)
    problems = dict.fromkeys(own.keys() - weights.keys(), "missing")
    problems |= dict.fromkeys(weights.keys() - own.keys(), "unexpected")
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            problems[name] = f"shape {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
    excused = [name for name in problems if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    refused = sorted(f"  {name}: {problem}" for name, problem in problems.items() if name not in excused)
    if refused:
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise ValueError(
            f"the weights are not those of this {type(module).__name__} (another architecture or vocabulary?):\n"
            + "\n".join(refused[:20])
            + more
        )
    module.load_state_dict({name: tensor for name, tensor in weights.items() if name not in excused}, strict=False)
    return sorted(excused)
