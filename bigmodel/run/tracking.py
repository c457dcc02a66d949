"""Metric loggers: always a local `metrics.csv`, and optionally Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import errno
import netrc
import os
import secrets
import shutil
import sys
import time
import urllib.error
import urllib.request
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock
from urllib.parse import urlsplit

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import DummyExperiment
from lightning.pytorch.utilities import rank_zero_only

from bigmodel.data.schedule import training_steps
from bigmodel.internals import drop_init_argument
from bigmodel.run.secrets import mask_command, mask_secrets
from bigmodel.training.callbacks import TrainingLog
from bigmodel.training.callbacks.gradient_scaling import get_callback


class MetricsCSV(Logger):
    """Rows of metrics by optimizer step in one CSV file; a metric that appears later becomes a new column.

    Rows are buffered and written together: every few seconds, before each checkpoint (by `bigmodel.run.RunDirectory`),
    and at the end.

    Args:
        path: the file.
        trainer: its optimizer step is written; Lightning's own step is one less during validation.
        keep_until: on resuming, the optimizer step up to which rows are kept; later ones, of steps that will be
            repeated, are removed. None: a new file.
        every_seconds: seconds between writes.
    """

    def __init__(self, path: Path, trainer: Trainer, keep_until: int | None = None, every_seconds: float = 5.0) -> None:
        super().__init__()
        self.path, self.trainer, self.every_seconds = path, trainer, every_seconds
        self._columns: list[str] = ["step"]
        self._rows: list[dict[str, Any]] = []
        self._explained = False
        self._next = time.monotonic() + every_seconds
        if keep_until is not None and path.exists():
            self._columns, kept, damaged = _read_rows(path)
            if damaged:
                aside = path.with_name("metrics.damaged.csv")
                shutil.copyfile(path, aside)
                print(f"{path} is damaged: {damaged:,} lines are left out; {aside.name} has them", flush=True)
            self._rewrite([row for row in kept if int(row["step"]) <= keep_until])

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def experiment(self) -> Any:
        """The W&B run for a module's `self.logger.experiment`; without one, an object whose methods do nothing."""
        if (tracked := next((one for one in self.trainer.loggers if isinstance(one, WandBRun)), None)) is not None:
            return tracked.experiment
        if not self._explained:
            print(
                "logger     self.logger.experiment records nothing: there is no W&B run, and no TensorBoard unless"
                " --trainer.logger lightning.pytorch.loggers.TensorBoardLogger",
                flush=True,
            )
            self._explained = True
        return DummyExperiment()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they are in the run directory's `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._rows.append({"step": training_steps(self.trainer), **_with_seen(metrics, self.trainer)})

    @rank_zero_only
    def save(self) -> None:
        if time.monotonic() >= self._next:
            self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write the buffered rows."""
        self._next = time.monotonic() + self.every_seconds
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        try:
            self._add(rows)
        except OSError as error:
            check_exists(self.path.parent)
            raise OSError(error.errno, f"metrics cannot be written ({error.strerror})", str(self.path)) from error

    def _add(self, rows: list[dict[str, Any]]) -> None:
        new = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in self._columns]
        if new:
            self._columns += new
            earlier: list[dict[str, Any]] = []
            if self.path.exists():
                with open(self.path, newline="") as file:
                    earlier = list(csv.DictReader(file))
            self._rewrite([*earlier, *rows])
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self._columns).writerows(rows)

    def discard(self) -> None:
        """Drop the buffered rows."""
        self._rows = []

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)


def check_exists(directory: Path) -> None:
    """Raise FileNotFoundError if the directory of the run in progress was removed."""
    if not (directory / "config.yaml").exists():
        raise FileNotFoundError(
            errno.ENOENT, "the run directory was removed while the run was trained", str(directory)
        ) from None


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, Any]], int]:
    """Return columns, rows that can be read, and the number of lines that cannot; a line cut by a kill does not count."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        header, *lines = [line for line in file if line.endswith("\n")] or ["step\n"]
    columns = next(csv.reader([header.replace("\0", "\ufffd")]))
    if "step" not in columns or len({*columns}) < len(columns) or "\ufffd" in header:
        return ["step"], [], 1 + len(lines)
    rows = []
    for line in lines:
        cells = line.rstrip("\r\n").split(",")
        if (
            len(cells) == len(columns)
            and all(_is_number(cell) for cell in cells)
            and cells[columns.index("step")].isdigit()
        ):
            rows.append(dict(zip(columns, cells, strict=True)))
    return columns, rows, len(lines) - len(rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return cell in ("True", "False")
    return True


def _with_seen(metrics: dict[str, float], trainer: Trainer) -> dict[str, float]:
    """Return the metrics with the numbers of samples and tokens seen so far, so that either can be the axis."""
    log = get_callback(trainer, TrainingLog)
    return {**(log.seen(trainer) if log is not None else {}), **metrics}


@dataclass
class WandB:
    """Options for tracking in Weights & Biases; those that are None come from W&B's environment variables.

    Args:
        mode: `auto` is $WANDB_MODE if it is set, else online if there is a login and the server answers, else offline;
            `disabled` is off.
        project: the W&B project ($WANDB_PROJECT; default: bigmodel).
        entity: the W&B team or user ($WANDB_ENTITY; default: the login's own).
        name: name of the run ($WANDB_NAME; default: the name of the run directory).
        group: runs that belong together ($WANDB_RUN_GROUP).
        notes: a description ($WANDB_NOTES).
        job_type: such as train or eval ($WANDB_JOB_TYPE).
        tags: tags of the run ($WANDB_TAGS, separated by commas).
        log_checkpoint: upload the best checkpoint as an artifact when training ends.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    notes: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False

    def resolve_mode(self) -> tuple[str, str]:
        """Return `online`, `offline` or `disabled`, and the reason if `auto` chose offline; there is no prompt.

        Raises:
            ValueError: for an unknown $WANDB_MODE.
        """
        if self.mode != "auto":
            return self.mode, ""
        if mode := os.environ.get("WANDB_MODE"):
            if mode not in _MODES:
                raise ValueError(f"WANDB_MODE={mode}: {', '.join(_MODES)} are accepted; set it, or --wandb.mode")
            return _MODES[mode], ""
        import wandb

        settings: Any = wandb.setup().settings
        if not (settings.api_key or settings.identity_token_file or _in_netrc(urlsplit(settings.base_url).netloc)):
            return "offline", "no login"
        server = str(settings.base_url)
        return ("online", "") if _answers(server) else ("offline", f"{server} does not answer")


_MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "dryrun": "offline", "run": "online"}
_SECONDS_TO_ANSWER = 5.0


def _in_netrc(host: str) -> bool:
    """True if the person's netrc file, where `wandb login` writes, has a login for a host."""
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if name and netrc.netrc(Path(name).expanduser()).authenticators(host) is not None:
                return True
    return False


def _answers(server: str) -> bool:
    """True if a server answers, with any status, directly or through the proxy of the environment."""
    try:
        urllib.request.urlopen(server, timeout=_SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def new_run_id() -> str:
    """Return the id of a new W&B run: $WANDB_RUN_ID, which a sweep's agent sets, else a random one.

    A fold of a cross-validation has an id of its own.
    """
    given = os.environ.get("WANDB_RUN_ID") if "BIGMODEL_RUN_DIRECTORY" not in os.environ else None
    return given or secrets.token_hex(4)


class WandBRun(WandbLogger):
    """One W&B run for one run directory: its resolved configuration, metrics by optimizer step, the best checkpoint.

    Args:
        options: see `WandB`.
        mode: `online` or `offline`.
        directory: the run directory; W&B's files go to `wandb/` inside it.
        run_id: the W&B run's id, the same when the run is resumed or evaluated.
        config: the resolved configuration, uploaded once, nested; None: uploaded before.
        trainer: its optimizer step is logged.
        step: the optimizer step of the evaluated checkpoint; None: the trainer's.
    """

    def __init__(
        self,
        options: WandB,
        mode: str,
        directory: Path,
        run_id: str,
        config: dict[str, Any] | None,
        trainer: Trainer,
        step: int | None = None,
    ) -> None:
        import wandb

        super().__init__(
            name=options.name or os.environ.get("WANDB_NAME") or "/".join(directory.parts[-2:]),
            save_dir=directory,
            id=run_id,
            project=options.project or os.environ.get("WANDB_PROJECT") or "bigmodel",
            entity=options.entity,
            group=options.group,
            notes=options.notes,
            job_type=options.job_type,
            tags=options.tags or None,
            resume="allow",
            mode=mode,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        drop_init_argument(self, "anonymous")  # Lightning passes it, and W&B warns about it
        self.options, self.directory, self.trainer, self.step = options, directory, trainer, step

    def start(self) -> dict[str, Any]:
        """Start the W&B run; return its id, project and entity.

        Raises:
            ValueError: if W&B cannot start it.
        """
        import wandb

        try:
            with mock.patch.object(sys, "argv", mask_command(sys.argv)):  # W&B uploads the command
                run = self.experiment
        except wandb.Error as error:
            raise ValueError(
                f"W&B cannot start the run ({' '.join(str(error).split())}): set --wandb.mode offline, or correct the login,"
                " --wandb.project and --wandb.entity"
            ) from error
        return {"id": run.id, "project": run.project, "entity": run.entity or None}

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        if self.step is None:
            super().log_metrics(_with_seen(metrics, self.trainer), step=training_steps(self.trainer))
        else:
            super().log_metrics(metrics, step=self.step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        super().log_hyperparams(mask_secrets(vars(params) if isinstance(params, Namespace) else dict(params))[0])

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if checkpoint_callback.monitor is not None:
            self.experiment.summary["best_checkpoint"] = str(checkpoint_callback.best_model_path)
            self.experiment.summary[f"best/{checkpoint_callback.monitor}"] = float(checkpoint_callback.best_model_score)
            self._best = checkpoint_callback.best_model_path

    @rank_zero_only
    def finalize(self, status: str) -> None:
        best = getattr(self, "_best", None)
        if self.options.log_checkpoint and best and status == "success":
            import wandb

            artifact = wandb.Artifact(f"checkpoint-{self.experiment.id}", type="model")
            (artifact.add_dir if Path(best).is_dir() else artifact.add_file)(best)
            self.experiment.log_artifact(artifact, aliases=["best"])
        self.experiment.finish(exit_code=0 if status == "success" else 1)
