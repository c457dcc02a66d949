"""Metric loggers: always a local `metrics.csv`, and optionally Weights & Biases."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from bigmodel.internals import drop_init_argument
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

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: they are in the run directory's `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._rows.append({"step": self.trainer.global_step, **_with_seen(metrics, self.trainer)})

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
    """Options for tracking in Weights & Biases.

    Args:
        mode: `auto` is online if there is a login (or WANDB_MODE is set so) and offline otherwise; `disabled` is off.
        project: the W&B project.
        entity: the W&B team or user; None: the login's own.
        tags: tags of the run.
        log_checkpoint: upload the best checkpoint as an artifact when training ends.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "bigmodel"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    log_checkpoint: bool = False

    def resolved_mode(self) -> str:
        """Return `online`, `offline` or `disabled`, without a prompt and without network access."""
        if self.mode != "auto":
            return self.mode
        if os.environ.get("WANDB_MODE"):
            return os.environ["WANDB_MODE"]
        import wandb

        return "online" if wandb.login(prompt=False, verify=False) else "offline"


class WandBRun(WandbLogger):
    """One W&B run for one run directory: its resolved configuration, metrics by optimizer step, the best checkpoint.

    Args:
        options: see `WandB`.
        directory: the run directory; W&B's files go to `wandb/` inside it.
        run_id: the W&B run's id, the same when the run is resumed.
        config: the resolved configuration, uploaded once, nested.
        trainer: its optimizer step is logged.
    """

    def __init__(self, options: WandB, directory: Path, run_id: str, config: dict[str, Any], trainer: Trainer) -> None:
        import wandb

        mode = options.resolved_mode()
        super().__init__(
            name="/".join(directory.parts[-2:]),
            save_dir=directory,
            id=run_id,
            project=options.project,
            entity=options.entity,
            tags=options.tags,
            resume="allow",
            mode=mode,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
        drop_init_argument(self, "anonymous")  # Lightning passes it, and W&B warns about it
        self.options, self.directory, self.trainer = options, directory, trainer

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        super().log_metrics(_with_seen(metrics, self.trainer), step=self.trainer.global_step)

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
