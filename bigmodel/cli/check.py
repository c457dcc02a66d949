"""`bigmodel check`: a few steps of a run, to find errors before a long job, and to estimate its duration.

It is a `fit` of the same configuration, with a temporary folder as run directory, which stops after some steps, a
checkpoint and a few batches of validation. It prints one line per finding.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from bigmodel.cli import ClearError
from bigmodel.cli.class_help import print_class_help
from bigmodel.cli.dry_run import Findings, Probe
from bigmodel.cli.formatting import format_bytes
from bigmodel.cli.lightning_warnings import quiet_lightning
from bigmodel.cli.run_verb import run_verb
from bigmodel.cli.trainer_cli import TrainerCLI, merge_config
from bigmodel.data import checksums
from bigmodel.internals import clear_minimum, save_triggers
from bigmodel.run.config import parse_flags
from bigmodel.training.callbacks import Anomalies, Checkpoint, StepTimer

_VALIDATION_BATCHES = 4


def run_check(argv: list[str]) -> Probe | None:
    """Check the run that `bigmodel fit` would start with these arguments.

    Returns:
        The measurements; None if only the help of a class was requested.

    Raises:
        ValueError: for anything that `fit` refuses.
        SystemExit: with status 1, if a finding is a failure.
    """
    positional, files, flags = parse_flags(argv)
    if positional:
        raise ValueError(f"unexpected argument {positional[-1]!r} (a YAML file is given with -c)")
    if not files and not any(key.endswith(".help") for key, _ in flags):
        raise ValueError("nothing to check: give an experiment with -c FILE.yaml")
    merged = merge_config(files, flags)
    if print_class_help(flags, merged):
        return None
    quiet_lightning()
    probe = Probe(merged)
    cli = TrainerCLI(merged, [probe])
    runs_dir = Path(cli.config.runs_dir).absolute()
    probe.findings = findings = Findings(cli.trainer.is_global_zero)
    # On the disk of the checkpoints, to measure its speed and free space.
    with _temporary_folder(runs_dir) as folder:
        probe.config = {**cli.resolved(), "runs_dir": folder}
        _shorten(cli.trainer, probe)
        try:
            with checksums.whole():
                run_verb("fit", cli, None, None)
        except ClearError:  # the configuration: before the run has begun
            raise
        except Exception as error:
            if not _out_of_memory(error):
                findings.fail(probe.stage, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                raise
            findings.fail("memory", "out of memory: set a smaller --data.micro_batch_size, or a smaller net")
        else:
            _estimate(cli.trainer, probe, shutil.disk_usage(folder).free, runs_dir)
    if findings.failed:
        sys.exit(1)
    return probe


def _temporary_folder(runs_dir: Path) -> tempfile.TemporaryDirectory[str]:
    existing = next(path for path in (runs_dir, *runs_dir.parents) if path.exists())
    try:
        return tempfile.TemporaryDirectory(prefix=".bigmodel-check-", dir=existing)
    except OSError as error:
        raise ValueError(
            f"--runs_dir {runs_dir}: the folder {existing} is not writable ({error.strerror}); choose another folder"
        ) from error


def _shorten(trainer: Any, probe: Probe) -> None:
    """Disable loggers, callbacks and options that would leave files, or print between the findings."""
    trainer.loggers = []
    # The probe prints instead of the bar, and checks the loss itself.
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, ProgressBar | Anomalies | StepTimer)]
    trainer.num_sanity_val_steps = 0
    probe.limit_val = limit = trainer.limit_val_batches
    if limit:
        trainer.limit_val_batches = min(limit, _VALIDATION_BATCHES) if isinstance(limit, int) else _VALIDATION_BATCHES
    clear_minimum(trainer)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _estimate(trainer: Any, probe: Probe, free: int, runs_dir: Path) -> None:
    """Report the estimated duration of the whole run, and the disk space of its checkpoints."""
    findings, steps, step_seconds = probe.findings, probe.total, probe.step_seconds
    if step_seconds is None:
        findings.ok("whole run", "one step: too short to estimate")
        return
    if steps < 0:
        findings.ok(
            "whole run",
            f"no maximum of steps; 1,000 steps take {_format_seconds(1000 * step_seconds)}, validation not included",
        )
        return
    seconds, included, validations = steps * step_seconds, [], 0
    if probe.batch_seconds is not None and trainer.val_check_batch is not None:
        batches = steps * probe.accumulation
        validations = num_validations(
            batches, trainer.num_training_batches, trainer.val_check_batch, probe.every_n_epoch
        )
        lengths = [len(loader) for loader in _loaders(trainer.val_dataloaders)]
        limit = probe.limit_val
        num_batches = sum(min(n, limit) if isinstance(limit, int) else int(n * limit) for n in lengths)
        probe.validation_seconds = num_batches * probe.batch_seconds
        seconds += validations * probe.validation_seconds
        included.append(f"{validations:,} validation(s) of {num_batches:,} batch(es)")
    saves = [_num_saves(callback, steps, seconds, validations) for callback in probe.checkpoints]
    seconds += sum(saves) * probe.save_seconds
    included.append(f"{sum(saves):,} checkpoint(s)")
    findings.ok(
        "whole run", f"{steps:,} steps take {_format_seconds(seconds)} at this speed, with {' and '.join(included)}"
    )
    # The next one is written before the previous one is deleted.
    saved = [n if c.save_top_k < 0 else min(n, c.save_top_k + 1) for c, n in zip(probe.checkpoints, saves, strict=True)]
    need = sum(saved) * probe.size
    if need > free:
        findings.fail(
            "disk",
            f"checkpoints need {format_bytes(need)}, {format_bytes(free)} are free in {runs_dir}: free some, choose another"
            " --runs_dir, or save fewer (--callbacks.NAME.save_top_k)",
        )
    else:
        findings.ok("disk", f"checkpoints need {format_bytes(need)}, {format_bytes(free)} are free in {runs_dir}")


def num_validations(batches: float, per_epoch: float, every: float, every_n_epoch: int | None) -> int:
    """Return the number of validations in a run.

    Args:
        batches: micro-batches of the whole run.
        per_epoch: micro-batches of an epoch.
        every: micro-batches between validations: of an epoch, or of the run if `every_n_epoch` is None.
        every_n_epoch: validate only in every n-th epoch.
    """
    if every_n_epoch is None:
        return int(batches // every)
    every = min(every, per_epoch)
    epochs, rest = divmod(batches, per_epoch)
    in_last = rest // every if (epochs + 1) % every_n_epoch == 0 else 0
    return int(epochs // every_n_epoch * (per_epoch // every) + in_last) if epochs else int(in_last)


def _num_saves(callback: Checkpoint | ModelCheckpoint, steps: int, seconds: float, validations: int) -> int:
    """Return the maximum number of checkpoints of a callback in a run of so many steps, seconds and validations."""
    if callback.save_top_k == 0:
        return 0
    if isinstance(callback, Checkpoint):
        every = callback.every_n_steps
        interval = None if callback.every_n_minutes is None else 60 * callback.every_n_minutes
    else:
        every, interval = save_triggers(callback)
    if callback.monitor is None and every:
        return -(-steps // every)  # the last step is always saved
    if callback.monitor is None and interval is not None:
        return int(seconds // interval) + 1
    return validations


def _format_seconds(seconds: float) -> str:
    return str(timedelta(seconds=max(1, round(seconds))))


def _loaders(loaders: Any) -> list[Any]:
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, list | tuple) else [loaders]
