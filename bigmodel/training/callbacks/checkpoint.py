"""Callback that decides when checkpoints are saved and which are retained."""

from __future__ import annotations

import functools
import re
import time
import weakref
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer, callbacks

from bigmodel.checkpoint.files import AtomicCheckpointIO
from bigmodel.data.schedule import num_steps, training_steps
from bigmodel.internals import validation_due

_STEPS_TO_AGREE = 10  # with several processes, the time limit is checked collectively at every tenth step only


_DEFAULT_METRIC = "val/loss"  # of defaults.yaml


def is_validation_metric(name: str) -> bool:
    """True for `val/loss`, `val_loss`, `valid_acc`, `loss/val` and the like."""
    return re.search(r"(^|[/_.])val(id|idation)?($|[/_.])", name) is not None


class Checkpoint(callbacks.Checkpoint):
    """Saves checkpoints that training resumes from exactly: if validation is due at a step, after the validation.

    Without a `monitor`, the last step is always saved, whatever ends the run: its length, `max_time`, early stopping.

    Args:
        monitor: the metric that selects the best checkpoint, for example `val/loss`; None: keep the latest. In place of
            a `val/loss` that is not logged, `val_loss` or the only validation loss is taken, or the latest is kept; a
            line is printed.
        mode: `min` if the smallest metric is the best, `max` if the largest is.
        every_n_steps: optimizer steps between saves; None: see `every_n_minutes`. Without both: after each validation.
        every_n_minutes: minutes of training between saves, over all sessions of a run that is stopped and resumed.
        save_top_k: how many to keep, the best or the latest; -1 keeps all, 0 saves none.
        filename: name of the file; `{step}`, `{epoch}` and metrics in braces are filled in.
        asynchronous: continue training while a thread writes the file. Needs memory for one more copy of the
            checkpoint.

    Attributes:
        dirpath: the folder; set by `RunDirectory`, else `checkpoints` in the trainer's folder for logs.
        best_model_path: the best checkpoint, or the latest; empty before the first.
        best_model_score: the metric of the best; None before the first, and without `monitor`.
        best_k_models: metrics of the best checkpoints, by path.

    Raises:
        ValueError: for conflicting settings, `asynchronous` with a strategy that writes its own checkpoints, or a
            metric that validation does not compute.
    """

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        save_top_k: int = 1,
        filename: str = "{step}",
        asynchronous: bool = False,
    ) -> None:
        if monitor is not None and (every_n_steps is not None or every_n_minutes is not None):
            raise ValueError(
                f"--callbacks.NAME.monitor {monitor}: the checkpoint is saved after each validation; set every_n_steps and"
                " every_n_minutes to null, and --trainer.val_check_interval"
            )
        if every_n_steps is not None and every_n_minutes is not None:
            raise ValueError(
                f"--callbacks.NAME.every_n_steps {every_n_steps} and every_n_minutes {every_n_minutes} exclude each other:"
                " set one of them to null"
            )
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"--callbacks.NAME.every_n_steps {every_n_steps} must be at least 1, or null")
        if save_top_k < -1:
            raise ValueError(
                f"--callbacks.NAME.save_top_k {save_top_k} must be a number of checkpoints, or -1 for all of them"
            )
        if mode not in ("min", "max"):
            raise ValueError(f"--callbacks.NAME.mode {mode}: min or max is accepted")
        self.monitor, self.mode, self.save_top_k, self.filename = monitor, mode, save_top_k, filename
        self.every_n_steps, self.every_n_minutes, self.asynchronous = every_n_steps, every_n_minutes, asynchronous
        self.dirpath: str | None = None
        self.best_model_path = ""
        self.best_model_score: float | None = None
        self.best_k_models: dict[str, float] = {}
        self._latest: list[str] = []  # without a metric: the paths to keep, the newest last
        self._on_disk: list[str] = []  # names; temporarily one more than are kept
        self._deferred = False  # until the end of a validation
        _ = self.state_key  # by the configured metric, also if another one is taken
        self._last_step = self._step = -1
        self._saved_step = 0  # before the first step there is nothing to save
        self._saved_at = 0.0
        self._elapsed = 0.0  # seconds from the last save to the checkpoint that is resumed from

    @functools.cached_property
    def state_key(self) -> str:
        """Name of the state in a checkpoint, in the form of Lightning's ModelCheckpoint, as in earlier versions."""
        minutes = None if self.every_n_minutes is None else timedelta(minutes=self.every_n_minutes)
        trigger = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self.every_n_steps or 0,
            "every_n_epochs": int(self._after_validation),
            "train_time_interval": minutes,
        }
        # Two callbacks may have the same trigger. The names of the default ones are left out, as in earlier versions.
        name = "" if self.filename in ("best-{step}", "last-{step}", "{step}") else self.filename
        return f"{type(self).__qualname__}{trigger}{name}"

    @property
    def _after_validation(self) -> bool:
        return self.every_n_steps is None and self.every_n_minutes is None

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_model_path": self.best_model_path,
            "best_model_score": self.best_model_score,
            "best_k_models": self.best_k_models,
            "latest": self._latest,
            "on_disk": self._on_disk,
            "elapsed": time.monotonic() - self._saved_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, also if the run directory was moved; checkpoints that no longer exist are dropped."""
        folder = Path(str(self.dirpath))

        def here(path: str) -> str:
            moved = folder / Path(path).name
            return str(moved) if path and moved.exists() else ""

        score = state_dict["best_model_score"]
        self.best_model_score = None if score is None else float(score)  # earlier versions saved tensors
        self.best_model_path = here(state_dict["best_model_path"])
        self.best_k_models = {
            here(path): float(score) for path, score in state_dict["best_k_models"].items() if here(path)
        }
        latest = state_dict.get("latest", [state_dict["best_model_path"]])  # earlier versions kept the newest or all
        self._latest = [here(path) for path in latest if here(path)]
        self._on_disk = list(state_dict.get("on_disk", []))
        self._elapsed = state_dict.get("elapsed", 0.0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")
        if self.asynchronous and not isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO):
            raise ValueError(
                f"--callbacks.NAME.asynchronous true: {type(trainer.strategy).__name__} writes its own checkpoints, and none"
                " asynchronously; set it to false"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.save_top_k > 0:  # a run killed between a write and the following removal left one extra file
            kept = {Path(path).name for path in (*self.best_k_models, self.best_model_path, *self._latest)}
            for name in sorted(set(self._on_disk) - kept):
                self._remove(trainer, str(Path(str(self.dirpath)) / name))
        self._last_step, self._step = num_steps(trainer), training_steps(trainer)
        if self._path(trainer) in self._latest:  # the checkpoint that is resumed from
            self._saved_step = self._step
        self._saved_at = time.monotonic() - self._elapsed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = training_steps(trainer)
        if self.monitor is not None or step == self._step:  # after validations only; accumulating
            return
        self._step = step
        due = step == self._last_step  # always save at the end of the run
        if self.every_n_steps is not None:
            due |= step % self.every_n_steps == 0
        elif self.every_n_minutes is not None and (trainer.world_size == 1 or step % _STEPS_TO_AGREE == 0):
            late = time.monotonic() - self._saved_at >= self.every_n_minutes * 60
            due |= trainer.strategy.broadcast(late)
        if not due:
            return
        self._saved_at = time.monotonic()
        if validation_due(trainer):
            self._deferred = True
        else:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is None:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._deferred or self._after_validation:
            self.save(trainer)
            self._deferred = False

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is already saved or not among the best.

        To resume exactly, do not call this where `validation_due`.
        """
        if trainer.state.fn != "fit" or trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if training_steps(trainer) == self._saved_step or self.save_top_k == 0:
            return
        self.choose_metric(trainer)
        path = self._path(trainer)
        before = (self.best_model_path, self.best_model_score, dict(self.best_k_models), self._latest, self._on_disk)
        surplus = self._select_latest(path) if self.monitor is None else self._select_best(trainer, path)
        if surplus is None:
            return
        self._on_disk = [*dict.fromkeys([*self._on_disk, Path(path).name])]
        try:
            self._write(trainer, path)
        except Exception:
            self.best_model_path, self.best_model_score, self.best_k_models, self._latest, self._on_disk = before
            raise
        self._saved_step = training_steps(trainer)
        if trainer.is_global_zero:
            this: Any = weakref.proxy(self)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(this)
        for earlier in surplus:  # one in another folder is that of the run that this one was resumed from
            if earlier != path and Path(str(self.dirpath)).absolute() in Path(earlier).absolute().parents:
                self._remove(trainer, earlier)

    def choose_metric(self, trainer: Trainer) -> None:
        """Monitor the validation loss under the name that the module gives it; without one, keep the latest.

        Nothing changes if the metric is logged, or is not the default one.
        """
        if self.monitor != _DEFAULT_METRIC or self.monitor in trainer.callback_metrics:
            return
        logged = [name for name in trainer.callback_metrics if is_validation_metric(name)]
        losses = [name for name in logged if "loss" in name.lower()]
        self.monitor = "val_loss" if "val_loss" in losses else losses[0] if len(losses) == 1 else None
        if not trainer.is_global_zero:
            return
        if self.monitor is not None:
            print(f"best       selected by {self.monitor}: the module does not log {_DEFAULT_METRIC}", flush=True)
        else:
            print(
                f"best       the latest checkpoint, because the module does not log {_DEFAULT_METRIC} (of validation it logs"
                f" {', '.join(logged) or 'nothing'}): set --callbacks.best.monitor and --callbacks.best.mode",
                flush=True,
            )

    def _path(self, trainer: Trainer) -> str:
        """Return the path of a checkpoint of this step; a metric that is not yet measured is 0 in its name."""
        values = defaultdict(int, trainer.callback_metrics, epoch=trainer.current_epoch, step=training_steps(trainer))
        template = re.sub(r"\{([^:}]+)", r"{0[\1]", self.filename)  # names of metrics have slashes and dots
        return str(Path(str(self.dirpath)) / f"{template.format(values)}.ckpt")

    def _select_latest(self, path: str) -> list[str]:
        """Enter a new checkpoint, and return those to be removed after it is written."""
        self.best_model_path = path
        if self.save_top_k < 0:
            return []
        latest = [*(earlier for earlier in self._latest if earlier != path), path]
        self._latest = latest[-self.save_top_k :]
        return latest[: -self.save_top_k]

    def _select_best(self, trainer: Trainer, path: str) -> list[str] | None:
        """Enter a new checkpoint, and return those to be removed; None if it is not among the best."""
        measured, scores = trainer.callback_metrics, self.best_k_models
        if self.monitor not in measured:
            raise ValueError(
                f"--callbacks.NAME.monitor {self.monitor}: validation has not logged this metric; it has logged"
                f" {', '.join(measured) or 'none'}. Set it to one of these, or --callbacks.NAME null"
            )
        score = float(measured[self.monitor])
        best, worst = (min, max) if self.mode == "min" else (max, min)
        surplus = []
        if len(scores) == self.save_top_k and path not in scores:
            last = worst(scores, key=scores.__getitem__)
            better = score < scores[last] if self.mode == "min" else score > scores[last]
            if not trainer.strategy.reduce_boolean_decision(better):
                return None
            del scores[last]
            surplus = [last]
        scores[path] = score if score == score else float("inf" if self.mode == "min" else "-inf")  # NaN is the worst
        self.best_model_path = best(scores, key=scores.__getitem__)
        self.best_model_score = scores[self.best_model_path]
        return surplus

    def _write(self, trainer: Trainer, path: str) -> None:
        writer = trainer.strategy.checkpoint_io
        if not isinstance(writer, AtomicCheckpointIO):
            trainer.save_checkpoint(path)
            return
        before, writer.asynchronous = writer.asynchronous, self.asynchronous or writer.asynchronous
        try:
            trainer.save_checkpoint(path)
        finally:
            writer.asynchronous = before  # for other callers of trainer.save_checkpoint

    def _remove(self, trainer: Trainer, path: str) -> None:
        trainer.strategy.remove_checkpoint(path)
        self._on_disk = [name for name in self._on_disk if name != Path(path).name]
