"""Training from Python and notebooks, with the run directory, callbacks and defaults of the command."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule

from bigmodel import run
from bigmodel.checkpoint import find_checkpoint
from bigmodel.cli.lightning_warnings import quiet_lightning
from bigmodel.cli.run_verb import run_verb
from bigmodel.cli.trainer_cli import TrainerCLI
from bigmodel.run.config import Config, layered, read_defaults


@dataclass(frozen=True)
class Run:
    """Result of `fit`.

    Attributes:
        directory: the run directory.
        task: the trained task, with its last weights, in evaluation mode. `bigmodel.load(run.directory)` returns it with
            its best ones.
        metrics: the last value of each metric that the task logged.
        best: the best checkpoint; the newest, if there was no validation. None if none was written.
        last: the newest checkpoint; None if none was written.
    """

    directory: Path
    task: LightningModule
    metrics: Mapping[str, float]
    best: Path | None
    last: Path | None


def fit(task: LightningModule, data: LightningDataModule | None = None, **settings: Any) -> Run:
    """Train a task, as `bigmodel fit` does, and return the run.

    Args:
        task: any LightningModule. Its weights, if they exist already, are those that it has now.
        data: its data module; None: the task has a `train_dataloader`.
        settings: keys of a YAML file of `bigmodel fit -c`, such as `experiment="digits"`, `seed_everything=1`,
            `trainer={"max_epochs": 3}` or `callbacks={"progress": None}`; a callback may also be an object. They are
            merged onto the defaults of the command.

    Raises:
        ValueError: for a task or settings that are not accepted, before training starts.
    """
    for name, given, kind in (("task", task, LightningModule), ("data", data, LightningDataModule)):
        if not isinstance(given, kind) and (given is not None or name == "task"):
            raise ValueError(
                f"{name}: {given!r} is not an object of a {kind.__name__}; pass one, as in bigmodel.fit(Task(), Data())"
            )
    if clash := {"model", "data"} & settings.keys():
        raise ValueError(
            f"{', '.join(sorted(clash))}: not a setting of bigmodel.fit; the task and its data are objects"
        )
    named = dict(settings.pop("callbacks", None) or {})
    objects = [callback for callback in named.values() if isinstance(callback, Callback)]
    off = {name: None if isinstance(callback, Callback) else callback for name, callback in named.items()}
    config = layered([read_defaults(), {**settings, "callbacks": off}], [])
    config["experiment"] = config.get("experiment") or type(task).__name__.lower()
    quiet_lightning()
    directory = checkpoint = None
    while True:
        record = run.RunDirectory(config, directory, checkpoint)
        cli = TrainerCLI(config, [record, *objects], given=(task, data))
        record.config = {**cli.resolved(), "model": _describe(task)} | (
            {} if data is None else {"data": _describe(data)}
        )
        earlier = run_verb("fit", cli, checkpoint, directory)
        if earlier is None:
            break
        directory, checkpoint = record.directory, earlier
        gc.collect()
    assert record.directory is not None
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    written = any((record.directory / "checkpoints").glob("*.ckpt"))
    best, last = (find_checkpoint(record.directory, which) if written else None for which in ("best", "last"))
    return Run(record.directory, task.eval(), metrics, best, last)


def _describe(given: LightningModule | LightningDataModule) -> Config:
    """Return class path and arguments of an object, as far as `save_hyperparameters` recorded them as plain values."""
    kind = type(given)
    arguments = {name: value for name, value in given.hparams.items() if _is_plain(value)}
    needed = {
        name
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    if missing := sorted(needed - arguments.keys()):
        print(
            f"config     without {', '.join(missing)} of {kind.__name__}, so that bigmodel.load cannot create it again: call"
            " self.save_hyperparameters() in its __init__, with plain values",
            flush=True,
        )
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _is_plain(value: Any) -> bool:
    try:
        yaml.safe_dump(value)
    except yaml.YAMLError:
        return False
    return True
