"""Run `fit`, `validate`, `test` or `predict` with a trainer, and translate errors that the user can correct."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bigmodel import run
from bigmodel.checkpoint import read
from bigmodel.cli import ClearError
from bigmodel.data.text import did_you_mean, print_text
from bigmodel.evaluation.predictions import check_prediction
from bigmodel.parallel import rendezvous
from bigmodel.training.callbacks import Preempted, RollbackRequested
from bigmodel.training.callbacks.gradient_scaling import get_callback

if TYPE_CHECKING:
    from bigmodel.cli.trainer_cli import TrainerCLI


def run_verb(verb: str, cli: TrainerCLI, checkpoint: Path | None, directory: Path | None) -> Path | None:
    """Run the verb. Errors that the user can correct become a ClearError until the run has begun.

    Returns:
        The checkpoint from which the fit continues after a rollback (see `Anomalies`); None: it is done.
    """
    trainer: Any = cli.trainer
    record = get_callback(trainer, run.RunDirectory)
    assert record is not None
    rendezvous.check_world_size(trainer)
    if trainer.world_size > 1:
        rendezvous.install_rendezvous(trainer, cli.resolved())
    try:
        with _clear_errors(record, cli.datamodule, checkpoint):
            if verb == "fit":
                trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
                return None
            metrics = _evaluate(verb, cli, checkpoint)
    except RollbackRequested as cause:
        trainer.strategy.barrier()  # until the first process has finished writing
        return record.rollback(cause)
    except Preempted as stopped:
        trainer.strategy.barrier()  # until the first process has updated its loggers: a launcher kills all when one exits
        sys.exit(_exit_status(trainer, stopped))
    except SystemExit as error:  # Lightning converts Ctrl-C to it
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    if verb in ("validate", "test") and trainer.is_global_zero and directory is not None:
        _write_metrics(metrics, directory / f"{verb}.json", checkpoint)
    return None


def _evaluate(verb: str, cli: TrainerCLI, checkpoint: Path | None) -> Any:
    """Run `validate`, `test` or `predict`; return what Lightning returns."""
    if checkpoint is None:
        raise ValueError(f"nothing to {verb}: name a run, as in `bigmodel {verb} RUN`")
    if verb == "predict":
        check_prediction(cli.model, cli.datamodule)
    content = read(checkpoint, verify=False, whole=False)
    if known := content.get("bigmodel", {}).get("sizes"):
        run.set_sizes(cli.model, known)
    # Optional method of a task: restores saved state that data or net depend on.
    if restore := getattr(cli.model, "restore_metadata", None):
        restore(content)
    quiet = {"return_predictions": False} if verb == "predict" else {"verbose": False}
    return getattr(cli.trainer, verb)(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, **quiet)


def _exit_status(trainer: Trainer, stopped: Preempted) -> int:
    """Return 0 for processes started by Lightning's own launcher, which kills the rest when one exits otherwise."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return 0 if trainer.global_rank > 0 and isinstance(environment, LightningEnvironment) else stopped.exit_code


def _write_metrics(metrics: list[dict[str, float]], path: Path, checkpoint: Path | None) -> None:
    """Print the metrics of all loaders, and write them as JSON."""
    values = {name: value for row in metrics for name, value in row.items()}
    for name, value in values.items():
        print_text(f"{name:32} {value:.6g}")
    path.write_text(json.dumps({"checkpoint": str(checkpoint), **values}, indent=2) + "\n")


@contextmanager
def _clear_errors(record: run.RunDirectory, data: Any, checkpoint: Path | None) -> Iterator[None]:
    """Convert errors of data, sizes and configuration to ClearError, before the run has begun."""
    try:
        yield
    except MisconfigurationException as error:  # Lightning's error for a wrong setting
        raise ClearError(str(error)) from error
    except (ValueError, OSError) as error:
        if record.started:
            raise
        raise ClearError(str(error)) from error
    except TypeError as error:
        sizes = getattr(data, "sizes", None) or {}
        unknown = re.search(r"__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if record.started or unknown is None or unknown[1] not in sizes:
            raise
        raise ClearError(
            f"--model: {str(error).partition('.')[0]} does not accept `{unknown[1]}`, which the data module provides (sizes:"
            f" {', '.join(sizes)}). Choose another --model.net, --model or --data"
        ) from error
    except RuntimeError as error:
        if (message := _clear_runtime_error(str(error), record)) is not None:
            raise ClearError(message) from error
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(
            f"{checkpoint} is of another architecture or vocabulary than this configuration describes:\n{error}"
        ) from error


def _clear_runtime_error(text: str, record: run.RunDirectory) -> str | None:
    """Return the message for an error of Lightning or torch that a setting causes; None for any other."""
    if stopping := re.match(
        r"Early stopping conditioned on metric `(.*?)` which is not available.*following: (.*)", text
    ):
        names = re.findall(r"`(.*?)`", stopping[2])
        return (
            f"--callbacks.NAME.monitor {stopping[1]} of EarlyStopping: this metric has not been logged; logged are"
            f" {', '.join(names) or 'none'}{did_you_mean(stopping[1], names)}"
        )
    precision = str(record.config["trainer"].get("precision"))
    if precision in ("bf16-true", "16-true") and re.search(r"should be the same|same dtype", text):
        mixed = precision.replace("true", "mixed")
        return (
            f"--trainer.precision {precision}: the weights are in this precision, but an input of the net is not"
            f" ({text.splitlines()[0]}); set --trainer.precision {mixed}"
        )
    return None
