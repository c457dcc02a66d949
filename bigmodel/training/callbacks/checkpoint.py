"""Callback that decides when checkpoints are saved and which are retained."""

from __future__ import annotations

import functools
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from bigmodel.checkpoint.files import AtomicCheckpointIO
from bigmodel.data.schedule import num_steps

_STEPS_TO_AGREE = 10  # with several processes, the time limit is checked collectively at every tenth step only


class Checkpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, safe to resume from: if validation is due at a step, it saves after the validation.

    Args:
        monitor: the metric that selects the best checkpoint, for example `val/loss`; None: keep the latest.
        mode: `min` if the smallest metric is the best, `max` if the largest is.
        every_n_steps: optimizer steps between saves; None: see `every_n_minutes`. Without both: after each validation.
        every_n_minutes: minutes of training between saves, over all sessions of a run that is stopped and resumed.
        keep: how many to keep, the best or the latest; -1 keeps all.
        filename: name of the file; `{step}` and metrics in braces are filled in.
        asynchronous: continue training while a thread writes the file. Needs memory for one more copy of the
            checkpoint.

    Raises:
        ValueError: for conflicting settings, or `asynchronous` with a strategy that writes its own checkpoints.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep: int = 1,
        filename: str = "{step}",
        asynchronous: bool = False,
    ) -> None:
        if monitor is not None and (every_n_steps is not None or every_n_minutes is not None):
            raise ValueError(
                f"a checkpoint that is kept by {monitor} is saved when validation has measured it: leave out every_n_steps"
                " and every_n_minutes, and set --trainer.val_check_interval"
            )
        if keep < -1:
            raise ValueError(f"keep {keep}: it is how many checkpoints to keep, or -1 for all of them")
        super().__init__(
            monitor=monitor,
            mode=mode,
            every_n_train_steps=every_n_steps,
            train_time_interval=timedelta(minutes=every_n_minutes) if every_n_minutes is not None else None,
            save_top_k=keep if monitor is not None else min(keep, 1),  # this class counts the latest itself
            filename=filename,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
        )
        self.keep, self.asynchronous = keep, asynchronous
        self._latest: list[str] = []  # without a metric: the paths that are kept, the newest last
        self._on_disk: list[str] = []  # names; temporarily one more than is kept
        self._last_step = self._step = -1
        self._saved_at = 0.0
        self._elapsed = 0.0  # seconds from the last save to the checkpoint that is resumed from
        self._enable_version_counter = False  # a step repeated after a resume overwrites the same file

    @functools.cached_property
    def state_key(self) -> str:
        """Cached state key of ModelCheckpoint, which rebuilds this string at every hook call, several times a step."""
        return super().state_key

    def state_dict(self) -> dict[str, Any]:
        elapsed = time.monotonic() - self._saved_at
        return {**super().state_dict(), "latest": self._latest, "on_disk": self._on_disk, "elapsed": elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, also if the run directory was moved; checkpoints that no longer exist are dropped."""
        folder = Path(str(self.dirpath))

        def here(path: str) -> str:
            moved = folder / Path(path).name
            return str(moved) if path and moved.exists() else ""

        best = {here(path): score for path, score in state_dict["best_k_models"].items() if here(path)}
        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best, "dirpath": self.dirpath})
        latest = state_dict.get("latest", [state_dict["best_model_path"]])  # earlier versions kept the newest or all
        self._latest = [here(path) for path in latest if here(path)]
        self._on_disk = list(state_dict.get("on_disk", []))
        self._elapsed = state_dict.get("elapsed", 0.0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.asynchronous and not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            raise ValueError(
                f"a checkpoint cannot be written asynchronously under {type(trainer.strategy).__name__}, which writes its"
                " own: leave out --callbacks.NAME.asynchronous"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.keep > 0:  # a run killed between a write and the following removal left one extra file
            kept = {Path(path).name for path in (*self.best_k_models, self.best_model_path, *self._latest)}
            for name in sorted(set(self._on_disk) - kept):
                self._remove_checkpoint(trainer, str(Path(str(self.dirpath)) / name))
        self._last_step, self._step = num_steps(trainer), trainer.global_step
        self._saved_at = time.monotonic() - self._elapsed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.monitor is not None or step == self._step:  # after validations only; accumulating
            return
        self._step = step
        due = step == self._last_step  # always save at the end of the run
        if self._every_n_train_steps:
            due |= step % self._every_n_train_steps == 0
        elif self._train_time_interval is not None and (trainer.world_size == 1 or step % _STEPS_TO_AGREE == 0):
            late = time.monotonic() - self._saved_at >= self._train_time_interval.total_seconds()
            due |= trainer.strategy.broadcast(late)
        if not due:
            return
        self._saved_at = time.monotonic()
        if validation_due(trainer):
            self._defer_save_until_validation = True  # `on_validation_end` saves
        else:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is already saved. To resume exactly, do not call this where `validation_due`."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        path = self.format_checkpoint_name(monitor_candidates)
        latest = [*(earlier for earlier in self._latest if earlier != path), path]
        surplus = latest[: -self.keep] if self.keep > 0 else []
        self._latest = latest[len(surplus) :] if self.keep > 0 else []
        self.best_model_path = path  # set before saving: it is part of the state
        self._save_checkpoint(trainer, path)
        for earlier in surplus:
            if self._should_remove_checkpoint(trainer, earlier, path):
                self._remove_checkpoint(trainer, earlier)

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self._on_disk = [name for name in self._on_disk if name != Path(filepath).name]

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self._on_disk = [*dict.fromkeys([*self._on_disk, Path(filepath).name])]
        writer = trainer.strategy.checkpoint_io
        if not self.asynchronous or not isinstance(writer, AtomicCheckpointIO):
            super()._save_checkpoint(trainer, filepath)
            return
        before, writer.asynchronous = writer.asynchronous, True
        try:
            super()._save_checkpoint(trainer, filepath)
        finally:
            writer.asynchronous = before  # for other callers of trainer.save_checkpoint

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """True for any other file in this callback's folder, also the one that the run was resumed from."""
        return previous != current and Path(str(self.dirpath)).absolute() in Path(previous).absolute().parents


def validation_due(trainer: Trainer) -> bool:
    """True if validation follows the optimizer step just taken."""
    epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    return fetcher is not None and epoch._should_check_val_fx(fetcher) and not epoch.val_loop.skip
