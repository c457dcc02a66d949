"""Callback that creates the run directory, updates its record, and directs loggers and checkpoints to it."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler

from bigmodel.checkpoint import checkpoint_step, clear_hidden, find_checkpoint, read
from bigmodel.internals import skip_hook
from bigmodel.run.paths import new_directory
from bigmodel.run.tracking import MetricsCSV, WandB, WandBRun
from bigmodel.training.callbacks import Checkpoint, Preempted, Resume, RollbackRequested, StepTimer
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.optimizers import num_steps
from bigmodel.training.precision import ChoosePrecision

_PACKAGES = ("bigmodel", "torch", "lightning", "torchmetrics", "transformers", "tokenizers", "wandb", "numpy")


def directory(trainer: Trainer) -> Path | None:
    """Return the directory of the run that is trained or evaluated; None outside the command."""
    record = get_callback(trainer, RunDirectory)
    return record.directory if record is not None else None


def runs_dir(trainer: Trainer) -> str:
    """Return the folder of this run and its neighbours, in which `last` and the end of a name are searched."""
    record = get_callback(trainer, RunDirectory)
    return record.runs_dir if record is not None else "runs"


def record_resolved_argument(trainer: Trainer, argument: str, value: Any) -> None:
    """Save the resolved value of a task's argument in config.yaml, such as a run directory for `last`; called in `setup`."""
    record = get_callback(trainer, RunDirectory)
    if record is not None:
        record.config["model"]["init_args"][argument] = value


def format_parameter_count(count: int) -> str:
    """Format a number of parameters, exact below a million."""
    return f"{count:,} parameters" if count < 1_000_000 else f"{count / 1e6:,.2f} M parameters"


class RunDirectory(Callback):
    """Creates the run directory when a fit starts, updates its record, and directs loggers and checkpoints to it.

    In an evaluation, it provides the path of that directory.

    Args:
        config: the resolved configuration, plain values.
        resumed: the directory of the run to resume; None: a new one.
        checkpoint: the checkpoint that is resumed or evaluated; None: none. With several processes, that of the first
            counts, because only the first has verified it.

    Attributes:
        restart_step: the optimizer step from which a resumed run continues.
        runs_dir: the folder of other runs.
    """

    def __init__(self, config: dict[str, Any], resumed: Path | None = None, checkpoint: Path | None = None) -> None:
        self.config, self.directory, self.checkpoint = config, resumed, checkpoint
        self.runs_dir = str(config.get("runs_dir", "runs"))
        self.restart_step = 0
        self.resumed = resumed is not None
        self.started = False  # data, sizes and weights are ready
        self._froze = False
        self.record: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.checkpoint is not None:
            self.checkpoint = Path(trainer.strategy.broadcast(str(self.checkpoint)))
            self.restart_step = checkpoint_step(self.checkpoint)
        if self.directory is not None:
            self._place_profile(trainer, self.directory)
        if stage == "fit":
            if self.directory is not None:  # needed for the checkpoint that is read next
                self._place_checkpoints(trainer, self.directory)
                resume = get_callback(trainer, Resume)
                if resume is not None:
                    resume.returns = trainer.strategy.broadcast(_read_record(self.directory).get("returns", []))
        elif (
            self.checkpoint is not None and not (self.checkpoint / ".metadata").exists()
        ):  # not a folder in Lightning's own format
            content: dict[str, Any] = read(self.checkpoint, verify=False, whole=False).get("bigmodel", {})
            pl_module._sizes = content.get("sizes")  # type: ignore[assignment]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now: errors in configuration, data, sizes or weights have been raised before, and leave no directory.
        total = num_steps(trainer)
        if self.resumed and 0 <= total <= self.restart_step:
            raise ValueError(
                f"{self.directory} has taken all of its {total:,} optimizer steps: nothing is left to resume. Set a larger"
                " --trainer.max_steps or --trainer.max_epochs to go on"
            )
        self.started = True
        chosen = get_callback(trainer, ChoosePrecision)
        if chosen is not None and chosen.choice is not None:
            self.config["trainer"]["precision"] = chosen.choice.precision
        if trainer.is_global_zero:
            self.directory = self._open()
            if file := os.environ.get("BIGMODEL_RUN_FILE"):
                Path(file).write_text(f"{self.directory.resolve()}\n")
        self.directory = Path(trainer.strategy.broadcast(str(self.directory)))
        self._place_checkpoints(trainer, self.directory)
        self._place_profile(trainer, self.directory)
        if trainer.is_global_zero:
            self._start_loggers(trainer, self.directory)
            self._say_what_runs(trainer, pl_module)
            self._say_precision(trainer, pl_module)

    def _open(self) -> Path:
        """Return the directory, with configuration and record in it.

        Raises:
            ValueError: if it cannot be written; a new directory is then removed.
        """
        made: Path | None = None
        try:
            if self.directory is None:
                self.directory = made = self._new_directory()
            self._write_config(self.directory)
            clear_hidden(self.directory / "checkpoints")
            self.record = self._begin_record(self.directory)
        except OSError as error:
            where = self.directory or self.config["runs_dir"]
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
                self.directory = None
            raise ValueError(
                f"the run cannot be kept in {where} ({error.strerror}): make room there, or set --runs_dir to another place"
            ) from error
        return self.directory

    def _new_directory(self) -> Path:
        if place := os.environ.get("BIGMODEL_RUN_DIRECTORY"):
            directory = Path(place)
            directory.mkdir(parents=True)
            return directory
        return new_directory(self.config["runs_dir"], self.config["experiment"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Current objects stay alive. Without freezing, the garbage collector repeatedly scans a million objects of imported
        # packages during training: 3 % of the time of a small model's steps. The program may have frozen them already.
        if gc.get_freeze_count() == 0:
            gc.collect()
            gc.freeze()
            self._froze = True
        _leave_out_empty_hooks(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unfreeze()

    def _unfreeze(self) -> None:
        if self._froze:
            gc.unfreeze()
            self._froze = False

    @staticmethod
    def _place_checkpoints(trainer: Any, directory: Path) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint | ModelCheckpoint):
                callback.dirpath = str((directory / "checkpoints").resolve())

    @staticmethod
    def _place_profile(trainer: Any, directory: Path) -> None:
        """Direct the profiler, if there is one, to the directory, unless another was configured."""
        profiler = trainer.profiler
        if isinstance(profiler, PassThroughProfiler):  # none
            return
        if profiler.dirpath == trainer.log_dir:  # Lightning's default
            profiler.dirpath = str(directory / "profile")
            profiler.filename = profiler.filename or "profile"  # else it writes no file

    def _write_config(self, directory: Path) -> None:
        path, text = directory / "config.yaml", yaml.safe_dump(self.config, sort_keys=False)
        if path.exists():
            if path.read_text() == text:
                return
            shutil.copyfile(path, directory / f"config.until-step-{self.restart_step}.yaml")
        partial = directory / ".config.yaml.partial"  # if killed here, the old file is still complete
        partial.write_text(text)
        os.replace(partial, path)

    def _begin_record(self, directory: Path) -> dict[str, Any]:
        record = _read_record(directory)
        now = datetime.now(UTC).isoformat()
        record.setdefault("created", now)
        record.setdefault("wandb_id", secrets.token_hex(4))
        record.setdefault("sessions", []).append(
            {
                "started": now,
                "step": self.restart_step,
                "command": shlex.join(sys.argv),
                "git": _git_revision(),
                "host": platform.node(),
                "python": platform.python_version(),
                "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
            }
        )
        self._write_record(record, status="running")
        return record

    def _write_record(self, record: dict[str, Any], **news: Any) -> None:
        record.update(news)
        assert self.directory is not None
        partial = self.directory / ".run.json.partial"
        partial.write_text(json.dumps(record, indent=2))
        os.replace(partial, self.directory / "run.json")

    def _start_loggers(self, trainer: Trainer, directory: Path) -> None:
        keep = self.restart_step if self.resumed else None
        trainer.loggers = [*trainer.loggers, MetricsCSV(directory / "metrics.csv", trainer, keep)]
        settings = WandB(**self.config["wandb"])
        mode = settings.resolved_mode()
        print(f"run        {directory}{f' (resumed at step {self.restart_step:,})' if self.resumed else ''}")
        if mode != "disabled":
            wandb = WandBRun(settings, directory, self.record["wandb_id"], self.config, trainer)
            _ = wandb.experiment  # started now, not at the first log: errors are raised before the first step
            trainer.loggers = [*trainer.loggers, wandb]
            print(f"tracking   metrics.csv, and W&B {mode}" + (" (no login)" if mode == "offline" else ""))

    @staticmethod
    def _say_what_runs(trainer: Trainer, pl_module: LightningModule) -> None:
        net = getattr(pl_module, "net", None) or pl_module
        count = sum(p.numel() for p in net.parameters())
        print(f"net        {type(net).__name__}, {format_parameter_count(count)}")
        on_gpu = pl_module.device.type == "cuda"
        device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
        print(
            f"device     {trainer.world_size} x {pl_module.device.type} ({device}), {trainer.precision},"
            f" {trainer.accumulate_grad_batches} micro-batch(es) a step",
            flush=True,
        )
        profiler: Any = trainer.profiler  # type: ignore[attr-defined]
        if not isinstance(profiler, PassThroughProfiler):
            print(f"profile    {profiler.dirpath}: a table at the end", flush=True)
        tell = getattr(pl_module, "log_trainable_parameters", None)  # optional: a task's own lines about its net
        if tell is not None:
            tell()

    def _say_precision(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line on the precision, and record the choice and its reason."""
        chooser = get_callback(trainer, ChoosePrecision)
        if chooser is None:
            return
        if chooser.choice is not None:
            self._write_record(self.record, precision=dataclasses.asdict(chooser.choice))
        chosen_before = self.record.get("precision", {}).get("precision") == trainer.precision
        if (line := chooser.describe(trainer, pl_module, chosen_before)) is not None:
            print(line, flush=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()  # before the checkpoint is written: a run resumed from it does not log these rows again
        data = getattr(trainer, "datamodule", None)
        model = self.config["model"]
        if trained := getattr(pl_module, "trained_submodule", None):  # name of the argument that is the trained task
            model = model["init_args"][trained]
        checkpoint["bigmodel"] = {
            "version": importlib.metadata.version("bigmodel"),
            "model": model,
            "sizes": getattr(data, "sizes", {}),
            "keys": list(checkpoint),  # all keys not written by the task, whose hook is called last
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._unfreeze()
        if isinstance(exception, RollbackRequested):
            self._report(trainer, "running")
            for logger in trainer.loggers:
                if isinstance(logger, WandBRun):
                    logger.experiment.mark_preempting()
            return
        stopped = exception if isinstance(exception, Preempted) else None
        by_hand = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        self._report(trainer, stopped.status if stopped else by_hand)
        if not self.record:
            return
        for logger in trainer.loggers:
            if stopped and isinstance(logger, WandBRun):
                logger.experiment.mark_preempting()  # so that W&B does not mark it as crashed
        where = "there" if stopped and stopped.saved else "the last checkpoint"
        how = f"stopped by {stopped.signal.name}" if stopped else "stopped"
        print(
            f"{how} at step {trainer.global_step:,}; `bigmodel fit --resume {self.directory}` goes on from {where}",
            flush=True,
        )

    def go_back(self, cause: RollbackRequested) -> Path:
        """Return the checkpoint to continue from after a rollback; record it for this and later sessions.

        Raises:
            FloatingPointError: if there is none.
        """
        if self.directory is None or not any(self.directory.glob("checkpoints/*.ckpt")):
            if self.record:
                self._write_record(self.record, status="failed")
            raise FloatingPointError(f"{cause}. There is no checkpoint yet to go back to")
        if not self.record:  # not the first process, which prints and records
            return find_checkpoint(self.directory, "last", verify=False)
        checkpoint = find_checkpoint(self.directory, "last")
        step, beyond = checkpoint_step(checkpoint), cause.beyond
        entry = {"step": cause.step, "to": step, "epoch": beyond.epoch, "samples": beyond.samples, "why": str(cause)}
        returns = self.record.get("returns", [])
        if entry not in returns:  # already recorded, if an older checkpoint had to be used on resume
            self._write_record(self.record, returns=[*returns, entry])
        passed_over = f"the samples of optimizer steps {step + 1:,} to {cause.step:,} are passed over"
        print(f"{cause}; back to {checkpoint.name}: {passed_over}", flush=True)
        return checkpoint

    def _report(self, trainer: Trainer, status: str) -> None:
        if not self.record:  # not the first process, or stopped before the run began
            return
        news: dict[str, Any] = {"status": status, "step": trainer.global_step}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint | ModelCheckpoint) and callback.best_model_score is not None:
                score = float(callback.best_model_score)
                news["best"] = {"metric": callback.monitor, "value": score, "checkpoint": callback.best_model_path}
        times = get_callback(trainer, StepTimer)
        if times is not None and status not in ("running", "failed"):
            news["sessions"] = self.record["sessions"]
            news["sessions"][-1]["times"] = {part: round(spent, 3) for part, spent in times.finish().items()}
        self._write_record(self.record, **news)


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def _leave_out_empty_hooks(trainer: Any) -> None:
    """Set the per-step hooks that a callback does not override to None.

    Six times a step Lightning calls every callback, with considerable overhead; it skips hooks that are not callable.
    """
    step = ("train_batch_start", "before_zero_grad", "before_backward", "after_backward", "before_optimizer_step")
    for hook in (*(f"on_{name}" for name in step), "on_train_batch_end"):
        for callback in trainer.callbacks:
            if getattr(type(callback), hook) is getattr(Callback, hook):
                skip_hook(callback, hook)


def _git_revision() -> str | None:
    """Return the revision of the working directory, `+changes` appended if it is modified; None outside a repository."""
    try:
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changed.strip() else "")
