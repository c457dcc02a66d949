"""Short in-process runs of a task, small and comparable."""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from bigmodel import run
from bigmodel.cli.trainer_cli import TrainerCLI
from bigmodel.data.sampling import Loader
from bigmodel.evaluation.predictions import PredictionWriter
from bigmodel.run.config import Config, read_defaults
from bigmodel.testing.recorder import STEPS, RunRecorder
from bigmodel.testing.samples import first_samples

_LARGEST_BATCH = 16
_SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}  # Adam would amplify the smallest difference


def short_run_config(given: Config, folder: Path, *, comparable: bool = False, **changes: Any) -> Config:
    """Return an experiment's configuration, changed to a short and small run on one CPU in float32.

    Args:
        given: the merged configuration.
        folder: the folder of run directories.
        comparable: plain gradient descent without a schedule and without clipping, so that rounding errors are not
            amplified.
        changes: `micro_batch_size` (samples), or keys of the trainer.
    """
    config = copy.deepcopy(given)
    default = read_defaults()["callbacks"]
    added = {name: block for name, block in (config.get("callbacks") or {}).items() if name not in default and block}
    # Only those of the task's own package: it may need them.
    config["callbacks"] = {
        name: block for name, block in added.items() if not _class_path(block).startswith("bigmodel.")
    }
    config |= {"runs_dir": str(folder), "experiment": "short", "wandb": {"mode": "disabled"}, "seed_everything": 0}
    data = config["data"].setdefault("init_args", {})
    data["batch_size"] = batch_size(given)
    data["micro_batch_size"] = changes.pop("micro_batch_size", None)
    clip = (config.get("trainer") or {}).get("gradient_clip_val")
    if comparable:
        config["model"].setdefault("init_args", {}).update(optimizer=_SGD, schedule=None)
        clip = None
    config["trainer"] = {
        "max_steps": STEPS, "accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true",
        "gradient_clip_val": clip, "limit_val_batches": 0, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "use_distributed_sampler": False, "enable_model_summary": False, **changes,
    }  # fmt: skip
    return config


def batch_size(given: Config) -> int:
    """Return the samples per optimizer step: the experiment's, but at most 16, and a multiple of four."""
    configured = (given["data"].get("init_args") or {}).get("batch_size", _LARGEST_BATCH)
    return max(4, min(int(configured), _LARGEST_BATCH) // 4 * 4)


def _class_path(block: Any) -> str:
    return str(block.get("class_path", "") if isinstance(block, dict) else block)


class _ShortRunDirectory(run.QuietRunDirectory):
    """Run directory of a run of a few steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the run is too short for the optimizations of a long one."""


def fit(config: Config, recorder: RunRecorder, resume: Path | None = None) -> RunRecorder:
    """Train, from the beginning or from a checkpoint."""
    recorder.config, record = config, _ShortRunDirectory(config)
    cli = TrainerCLI(config, [record])
    record.config = cli.resolved()
    recorder.trainer, recorder.task, recorder.data = cli.trainer, cli.model, cli.datamodule
    recorder.had_parameters = next(iter(cli.model.parameters()), None) is not None
    recorder.trainer.callbacks.append(recorder)  # last: its checkpoints are complete
    recorder.trainer.fit(recorder.task, datamodule=recorder.data, ckpt_path=resume)
    return recorder


def evaluate(config: Config, checkpoint: Path, samples_at_once: int | None) -> RunRecorder:
    """Validate a checkpoint on the first samples of the split.

    Args:
        config: of the short run.
        checkpoint: the checkpoint to evaluate.
        samples_at_once: batch size over all processes; None: all samples, without padding rows.
    """
    recorder, cli = RunRecorder(), TrainerCLI(config, [_ShortRunDirectory(config, checkpoint=checkpoint)])
    cli.trainer.limit_val_batches = 1.0
    trainer: Any = cli.trainer
    trainer.callbacks.append(recorder)
    loaders = cli.datamodule.val_dataloader
    cli.datamodule.val_dataloader = lambda: first_samples(loaders(), cli.trainer, samples_at_once)
    (metrics,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=False)
    recorder.metrics = {name: float(value) for name, value in metrics.items()}
    return recorder


def predict(config: Config, checkpoint: Path, output: Path) -> int:
    """Write predictions of the first samples; return their number."""
    cli = TrainerCLI(config, [_ShortRunDirectory(config, checkpoint=checkpoint), PredictionWriter(output)])
    loaders, count = cli.datamodule.predict_dataloader, []

    def first_loader() -> Loader:
        loader = first_samples(loaders(), cli.trainer, batch_size(config))
        count.append(len(loader.dataset.dataset))  # type: ignore[attr-defined]
        return loader

    cli.datamodule.predict_dataloader = first_loader
    with contextlib.redirect_stdout(io.StringIO()):  # the writer shows the first rows
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, return_predictions=False)
    return count[0]
