"""Callback that creates the run directory, updates its record, and directs loggers and checkpoints to it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.metadata
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.model_helpers import is_overridden

from bigmodel.checkpoint import checkpoint_step, clear_hidden, find_checkpoint, read
from bigmodel.data.lock import Held, Lock
from bigmodel.data.schedule import num_steps, training_steps
from bigmodel.data.text import print_text
from bigmodel.run.paths import new_directory
from bigmodel.run.record import new_session, read_record, replace_bytes, replace_text, write_record
from bigmodel.run.step_overhead import freeze_objects, skip_empty_hooks
from bigmodel.run.summary import describe_missing, print_summary
from bigmodel.run.tracking import MetricsCSV, WandB, WandBRun, check_exists, new_run_id
from bigmodel.training.callbacks import Checkpoint, Preempted, Resume, RollbackRequested, StepTimer
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.precision import ChoosePrecision


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
        runs_dir: the folder of all runs.
    """

    def __init__(self, config: dict[str, Any], resumed: Path | None = None, checkpoint: Path | None = None) -> None:
        self.config, self.directory, self.checkpoint = config, resumed, checkpoint
        self.runs_dir = str(config.get("runs_dir", "runs"))
        self.restart_step = 0
        self.resumed = resumed is not None
        self.started = False  # data, sizes and weights are ready
        self._froze = False
        self._lock: Lock | None = None
        self._tracking = ("disabled", "")
        self._before: dict[Path, bytes | None] = {}  # files of a resumed run, until its first step has succeeded
        self.record: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.checkpoint is not None:
            self.checkpoint = Path(trainer.strategy.broadcast(str(self.checkpoint)))
            self.restart_step = checkpoint_step(self.checkpoint)
        if self.directory is not None:
            self._set_profile_folder(trainer, self.directory)
        if stage == "fit":
            if self.directory is not None:
                self._acquire(trainer, self.directory)
                # Needed for the checkpoint that is read next.
                self._set_checkpoint_folder(trainer, self.directory)
                resume = get_callback(trainer, Resume)
                if resume is not None:
                    resume.returns = trainer.strategy.broadcast(read_record(self.directory).get("returns", []))
        elif (
            self.checkpoint is not None and not (self.checkpoint / ".metadata").exists()
        ):  # not in Lightning's own format
            content: dict[str, Any] = read(self.checkpoint, verify=False, whole=False).get("bigmodel", {})
            pl_module._sizes = content.get("sizes")  # type: ignore[assignment]

    def _acquire(self, trainer: Trainer, directory: Path) -> None:
        """Lock the directory of a run that is resumed, in the first process.

        Raises:
            ValueError: on all processes, if another one trains this run.
        """
        problem = None
        if trainer.is_global_zero:
            try:
                self._lock = Lock(directory / ".lock")
            except Held as error:
                problem = (
                    f"{directory} is being trained by {error.holder}: wait for its end, or stop it, before `--resume`"
                )
            except OSError as error:
                problem = _unwritable(directory, error)
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        if self.record.get("status") == "finished":
            self._print_result(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now: errors in configuration, data, sizes or weights have been raised before, and leave no directory.
        total = num_steps(trainer)
        if self.resumed and 0 <= total <= self.restart_step and not self._killed_at_end(trainer, total):
            raise ValueError(
                f"{self.directory} has taken all of its {total:,} optimizer steps: nothing is left to resume. Set a larger"
                " --trainer.max_steps or --trainer.max_epochs"
            )
        self.started = True
        chosen = get_callback(trainer, ChoosePrecision)
        if chosen is not None and chosen.choice is not None:
            self.config["trainer"]["precision"] = chosen.choice.precision
        if trainer.is_global_zero:
            self._tracking = self._resolve_tracking()
            self.directory = self._open()
            if file := os.environ.get("BIGMODEL_RUN_FILE"):
                Path(file).write_text(f"{self.directory.resolve()}\n")
        self.directory = Path(trainer.strategy.broadcast(str(self.directory)))
        self._set_checkpoint_folder(trainer, self.directory)
        self._set_profile_folder(trainer, self.directory)
        if trainer.is_global_zero:
            self._start_loggers(trainer, self.directory)
            self._print_summary(trainer, pl_module)
        elif not trainer.loggers:
            trainer.loggers = [DummyLogger()]  # for a module's `self.logger.experiment`

    def _killed_at_end(self, trainer: Trainer, total: int) -> bool:
        """True if the last step is saved, but the run's status does not say that it finished."""
        assert self.directory is not None
        unfinished = trainer.is_global_zero and read_record(self.directory).get("status") != "finished"
        return bool(trainer.strategy.broadcast(unfinished and total == self.restart_step))

    def _open(self) -> Path:
        """Return the directory, with configuration and record in it.

        Raises:
            ValueError: if it cannot be written; a new directory is then removed.
        """
        created: Path | None = None
        try:
            if self.directory is None:
                self.directory = created = self._new_directory()
                self._lock = Lock(created / ".lock")
            if created is None:
                self._before = {self.directory / name: _content(self.directory / name) for name in self._files()}
            self._write_config(self.directory)
            clear_hidden(self.directory / "checkpoints")
            self.record = self._begin_record(self.directory)
        except OSError as error:
            where = self.directory or self.config["runs_dir"]
            self._release()
            if created is not None:
                shutil.rmtree(created, ignore_errors=True)
                self.directory = None
            raise ValueError(_unwritable(where, error)) from error
        return self.directory

    def _new_directory(self) -> Path:
        if path := os.environ.get("BIGMODEL_RUN_DIRECTORY"):
            directory = Path(path)
            directory.mkdir(parents=True)
            return directory
        return new_directory(self.config["runs_dir"], self.config["experiment"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = True
        if trainer.state.fn in ("validate", "test") and trainer.is_global_zero and self.directory is not None:
            self._track_evaluation(trainer, self.directory)

    on_test_start = on_predict_start = on_validation_start

    def _track_evaluation(self, trainer: Trainer, directory: Path) -> None:
        """Log the evaluation's metrics and images to the W&B run of the fit, if it has one."""
        record = read_record(directory)
        if "wandb_id" in record and (directory / "wandb").is_dir():
            self._tracking = self._resolve_tracking()
            self._start_wandb(trainer, directory, record, None, step=self.restart_step)

    def _resolve_tracking(self) -> tuple[str, str]:
        """Return the mode of W&B, and the reason for `offline`."""
        return WandB(**self.config["wandb"]).resolve_mode()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._print_missing(trainer, pl_module)
        self._froze = freeze_objects() or self._froze
        skip_empty_hooks(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unfreeze()

    def _unfreeze(self) -> None:
        if self._froze:
            gc.unfreeze()
            self._froze = False

    @staticmethod
    def _set_checkpoint_folder(trainer: Any, directory: Path) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint | ModelCheckpoint):
                callback.dirpath = str((directory / "checkpoints").resolve())

    @staticmethod
    def _set_profile_folder(trainer: Any, directory: Path) -> None:
        """Direct the profiler, if there is one, to the directory, unless another was configured."""
        profiler = trainer.profiler
        if isinstance(profiler, PassThroughProfiler):  # none
            return
        if profiler.dirpath == trainer.log_dir:  # Lightning's default
            profiler.dirpath = str(directory / "profile")
            profiler.filename = profiler.filename or "profile"  # else it writes no file

    def _files(self) -> tuple[str, ...]:
        return ("config.yaml", "run.json", "metrics.csv", f"config.until-step-{self.restart_step}.yaml")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._before and trainer.global_step > self.restart_step:
            self._before = {}

    def _restore(self) -> None:
        """Undo the changes of a session that has taken no step."""
        for path, content in self._before.items():
            with contextlib.suppress(OSError):
                if content is None:
                    path.unlink(missing_ok=True)
                elif _content(path) != content:
                    replace_bytes(path, content)

    def _write_config(self, directory: Path) -> None:
        path, text = directory / "config.yaml", yaml.safe_dump(self.config, sort_keys=False)
        if path.exists():
            if path.read_text() == text:
                return
            shutil.copyfile(path, directory / f"config.until-step-{self.restart_step}.yaml")
        replace_text(path, text)

    def _begin_record(self, directory: Path) -> dict[str, Any]:
        record = read_record(directory)
        now = datetime.now(UTC).isoformat()
        record.setdefault("created", now)
        record.setdefault("wandb_id", new_run_id())
        record.setdefault("sessions", []).append(new_session(now, self.restart_step, self._plugins()))
        record["status"] = "running"
        write_record(directory, record)
        return record

    def _plugins(self) -> list[str]:
        """Return the class paths of task and data that are not from bigmodel."""
        blocks = (self.config.get(key) for key in ("model", "data"))
        paths = [block["class_path"] for block in blocks if isinstance(block, dict) and "class_path" in block]
        return [path for path in paths if not path.startswith("bigmodel.")]

    def _update_record(self, **changes: Any) -> None:
        self.record.update(changes)
        assert self.directory is not None
        write_record(self.directory, self.record)

    def _start_loggers(self, trainer: Trainer, directory: Path) -> None:
        keep_until = self.restart_step if self.resumed else None
        trainer.loggers = [*trainer.loggers, MetricsCSV(directory / "metrics.csv", trainer, keep_until)]
        print_text(f"run        {directory}{f' (resumed at step {self.restart_step:,})' if self.resumed else ''}")
        if (tracked := self._start_wandb(trainer, directory, self.record, self.config)) is not None:
            self._update_record(wandb=tracked)

    def _start_wandb(
        self,
        trainer: Trainer,
        directory: Path,
        record: dict[str, Any],
        config: dict[str, Any] | None,
        step: int | None = None,
    ) -> dict[str, Any] | None:
        """Start or continue the W&B run of this run directory, unless tracking is disabled; return its id and project."""
        mode, reason = self._tracking
        if mode == "disabled":
            return None
        options = WandB(**self.config["wandb"])
        earlier = record.get("wandb", {})  # a run stays in its project, also if the environment has changed
        options.project = options.project or earlier.get("project")
        options.entity = options.entity or earlier.get("entity")
        wandb = WandBRun(options, mode, directory, record["wandb_id"], config, trainer, step)
        started = wandb.start()  # now, not at the first log: errors are raised before the first step
        trainer.loggers = [*trainer.loggers, wandb]
        where = "metrics.csv, and " if step is None else ""
        print_text(f"tracking   {where}W&B {mode}" + (f" ({reason})" if reason else ""), flush=True)
        return started

    def _print_summary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print net, device and precision; record the chosen precision and its reason."""
        print_summary(trainer, pl_module)
        chooser = get_callback(trainer, ChoosePrecision)
        if chooser is None:
            return
        if chooser.choice is not None:
            self._update_record(precision=dataclasses.asdict(chooser.choice))
        chosen_before = self.record.get("precision", {}).get("precision") == trainer.precision
        if (line := chooser.describe(trainer, pl_module, chosen_before)) is not None:
            print_text(line, flush=True)

    def _print_missing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for line in describe_missing(trainer, pl_module):
            print(line, flush=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.record and self.directory is not None:
            check_exists(self.directory)
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
            self._record_status(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record_status(trainer, "finished")
        if self.record and not self._saved(trainer):
            print("no checkpoint was saved: this run can be neither resumed nor evaluated", flush=True)

    @staticmethod
    def _saved(trainer: Any) -> bool:
        """True if there is a checkpoint of this run, or one is being written."""
        savers = [each for each in trainer.callbacks if isinstance(each, Checkpoint | ModelCheckpoint)]
        return any(each.best_model_path or any(Path(str(each.dirpath)).glob("*.ckpt")) for each in savers)

    def _print_result(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the best metric, and the command that continues from here."""
        if best := self.record.get("best"):
            step = checkpoint_step(Path(best["checkpoint"]))
            print_text(f"best       {best['metric']} {best['value']:.5g} at step {step:,}")
        data = getattr(trainer, "datamodule", None) or pl_module
        steps = {"test": "test_step", "predict": "predict_step", "validate": "validation_step"}
        able = (
            verb
            for verb, step in steps.items()
            if is_overridden(step, pl_module)
            and is_overridden(f"{'val' if verb == 'validate' else verb}_dataloader", data)
        )
        print_text(f"next       bigmodel {next(able, 'export')} {self.directory}", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            failed = isinstance(exception, Exception | KeyboardInterrupt) and not isinstance(
                exception, FloatingPointError
            )
            if self._before and failed:
                for logger in trainer.loggers:
                    if isinstance(logger, MetricsCSV):
                        logger.discard()
                self._restore()
                print(f"no step was taken: {self.directory} is as it was", flush=True)
            else:
                self._conclude(trainer, exception)
        finally:
            self._unfreeze()
            if not isinstance(exception, RollbackRequested):  # then `rollback` releases it
                self._release()

    def _conclude(self, trainer: Trainer, exception: BaseException) -> None:
        """Record how the run was stopped, and print how to resume it."""
        stopped = exception if isinstance(exception, Preempted) else None
        rollback = isinstance(exception, RollbackRequested)
        if rollback:
            status = "running"
        elif stopped:
            status = stopped.status
        else:
            status = "interrupted" if isinstance(exception, KeyboardInterrupt) else "failed"
        try:
            self._record_status(trainer, status)
        except OSError as error:  # the reason of the exception may be the same: a full disk, or a removed directory
            print(f"the status {status} cannot be written to {self.directory}/run.json: {error.strerror}", flush=True)
        if rollback or stopped:
            for logger in trainer.loggers:
                if isinstance(logger, WandBRun):
                    logger.experiment.mark_preempting()  # so that W&B does not mark it as crashed
        if rollback or not self.record:
            return
        where = "that step" if stopped and stopped.saved else "the last checkpoint"
        how = f"stopped by {stopped.signal.name}" if stopped else "stopped"
        what = f"`bigmodel fit --resume {self.directory}` resumes from {where}"
        if self.directory is not None and not self.directory.exists():
            what = f"{self.directory} was removed: this run cannot be resumed"
        elif not self._saved(trainer):
            what = "no checkpoint was saved: this run cannot be resumed"
        print_text(f"{how} at step {training_steps(trainer):,}; {what}", flush=True)

    def rollback(self, cause: RollbackRequested) -> Path:
        """Return the checkpoint to continue from after a rollback; record it for this and later sessions.

        Raises:
            FloatingPointError: if there is none.
        """
        try:
            return self._roll_back(cause)
        finally:
            self._release()

    def _roll_back(self, cause: RollbackRequested) -> Path:
        if self.directory is None or not any(self.directory.glob("checkpoints/*.ckpt")):
            if self.record:
                self._update_record(status="failed")
            raise FloatingPointError(f"{cause}. There is no checkpoint yet to return to")
        if not self.record:  # not the first process, which prints and records
            return find_checkpoint(self.directory, "last", verify=False)
        checkpoint = find_checkpoint(self.directory, "last")
        step, beyond = checkpoint_step(checkpoint), cause.beyond
        entry = {"step": cause.step, "to": step, "epoch": beyond.epoch, "samples": beyond.samples, "why": str(cause)}
        returns = self.record.get("returns", [])
        if entry not in returns:  # already recorded, if an older checkpoint had to be used on resume
            self._update_record(returns=[*returns, entry])
        skipped = f"the samples of optimizer steps {step + 1:,} to {cause.step:,} are skipped"
        print_text(f"{cause}; back to {checkpoint.name}: {skipped}", flush=True)
        return checkpoint

    def _record_status(self, trainer: Trainer, status: str) -> None:
        if not self.record:  # not the first process, or stopped before the run began
            return
        changes: dict[str, Any] = {"status": status, "step": training_steps(trainer)}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint | ModelCheckpoint) and callback.best_model_score is not None:
                score = float(callback.best_model_score)
                changes["best"] = {"metric": callback.monitor, "value": score, "checkpoint": callback.best_model_path}
        times = get_callback(trainer, StepTimer)
        if times is not None and status not in ("running", "failed"):
            changes["sessions"] = self.record["sessions"]
            changes["sessions"][-1]["times"] = {part: round(spent, 3) for part, spent in times.finish().items()}
        self._update_record(**changes)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _unwritable(where: Any, error: OSError) -> str:
    return f"the run cannot be written to {where} ({error.strerror}): free space there, or set --runs_dir to another folder"


class QuietRunDirectory(RunDirectory):
    """Run directory of a short run: it prints nothing, logs only to metrics.csv, and does not say how to resume."""

    def _resolve_tracking(self) -> tuple[str, str]:
        return "disabled", ""

    def _start_loggers(self, trainer: Trainer, directory: Path) -> None:
        trainer.loggers = [MetricsCSV(directory / "metrics.csv", trainer)]  # some callbacks require a logger

    def _print_summary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the caller reports."""

    _print_result = _print_summary

    def _print_missing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the caller reports."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print nothing: there is no run to resume."""
        self._release()
