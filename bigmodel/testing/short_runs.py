"""Short in-process runs of a task that record samples, losses and weights for comparison."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.data import Dataset

from bigmodel import run
from bigmodel.checkpoint import read
from bigmodel.cli.trainer_cli import TrainerCLI
from bigmodel.data.sampling import Loader, eval_loader
from bigmodel.evaluation.predictions import PredictionWriter
from bigmodel.run.config import Config, read_defaults
from bigmodel.training.callbacks import Resume
from bigmodel.training.callbacks.gradient_scaling import get_callback

STEPS, STOPPED_AT = 4, 2  # optimizer steps of a run, and the step after which it is stopped and resumed
_EVALUATED = 37  # samples at most
_LARGEST_BATCH = 16
_SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}  # Adam would amplify the smallest difference


def short_run_config(given: Config, folder: Path, *, comparable: bool = False, **changes: Any) -> Config:
    """Return an experiment's config, made short and small, on one CPU, in float32.

    Args:
        given: the merged config.
        folder: the folder of run directories.
        comparable: plain gradient descent without a schedule and without clipping, so that rounding errors are not
            amplified.
        changes: of `micro_batch_size` (samples), or of keys of the trainer.
    """
    config = copy.deepcopy(given)
    default = read_defaults()["callbacks"]
    kept = {name: block for name, block in (config.get("callbacks") or {}).items() if name not in default and block}
    own = {name: block for name, block in kept.items() if not _class_path(block).startswith("bigmodel.")}
    config["callbacks"] = own  # from the task's own package: it may need them
    config |= {"runs_dir": str(folder), "experiment": "trial", "wandb": {"mode": "disabled"}, "seed_everything": 0}
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
    """Return the samples per optimizer step: the experiment's, but few, and a multiple of four."""
    configured = (given["data"].get("init_args") or {}).get("batch_size", _LARGEST_BATCH)
    return max(4, min(int(configured), _LARGEST_BATCH) // 4 * 4)


def _class_path(block: Any) -> str:
    return str(block.get("class_path", "") if isinstance(block, dict) else block)


class _Quiet(run.QuietRunDirectory):
    """Run directory of a run of a few steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: the run is too short for the optimizations of a long one."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: there is nothing to undo."""


@dataclass
class ShortRun(Callback):
    """Callback that records a run.

    Args:
        dropout: leave it on.
        seed: of random draws in the training step, not of the weights.
        check_sum: compute the first batch's loss in two halves as well.
        saves: write a checkpoint after `STOPPED_AT` steps and after the last.

    Attributes:
        taken: numbers of samples, by optimizer step.
        losses: of each micro-batch, as the task returned it.
        evaluated: numbers of the samples of weight above 0, in the order of evaluation.
        start, end: the parameters, copied.
        halves: (loss, count) of the first batch, and of its two halves.
    """

    dropout: bool = True
    seed: int = 0
    check_sum: bool = False
    saves: bool = False
    taken: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    halves: list[tuple[float, float]] = field(default_factory=list)
    output: Any = None  # of the first training step
    batch: Any = None  # the first, on its device
    checkpoints: list[Path] = field(default_factory=list)
    trainer: Any = None
    task: Any = None
    data: Any = None
    config: Config = field(default_factory=dict)
    had_parameters: bool = False  # before configure_model

    def __hash__(self) -> int:
        return id(self)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        step = pl_module.training_step

        @functools.wraps(inspect.unwrap(step))  # Lightning inspects the signature
        def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self.check_sum and not self.halves:
                half = num_rows(batch) // 2
                for part in (batch, sliced(batch, 0, half), sliced(batch, half, None)):
                    with torch.no_grad():  # the class's own method: bigmodel's wrapper counts
                        self.halves.append(
                            _sum_and_count(type(pl_module).training_step(pl_module, part, *args, **kwargs))
                        )
            output = step(batch, *args, **kwargs)
            if self.output is None:
                self.batch, self.output = batch, output
            loss: Any = output.get("loss") if isinstance(output, dict) else output
            self.losses.append(float(loss.detach()) if loss is not None else float("nan"))
            return output

        pl_module.training_step = watched  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("training_step", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.dropout:
            _switch_dropout_off(pl_module)
        resume = get_callback(trainer, Resume)
        assert resume is not None
        resume.seed = self.seed  # the weights are already initialized
        self.start, self._step = _copied(pl_module), trainer.global_step
        self.taken.append([])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.taken[-1] += batch.index.tolist() if hasattr(batch, "index") and isinstance(batch.index, Tensor) else []
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step < STEPS:
            self.taken.append([])
        if self.saves and self._step in (STOPPED_AT, STEPS):
            path = Path(str(run.directory(trainer))) / "checkpoints" / f"last-{self._step}.ckpt"
            trainer.save_checkpoint(path)
            self.checkpoints.append(path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end = _copied(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.evaluated += batch.index[batch.weight > 0].tolist()


def fit(config: Config, trial: ShortRun, resume: Path | None = None) -> ShortRun:
    """Train, from the beginning or from a checkpoint."""
    trial.config, record = config, _Quiet(config)
    cli = TrainerCLI(config, [record])
    record.config = cli.resolved()
    trial.trainer, trial.task, trial.data = cli.trainer, cli.model, cli.datamodule
    trial.had_parameters = next(iter(cli.model.parameters()), None) is not None
    trial.trainer.callbacks.append(trial)  # last: its checkpoints are complete
    trial.trainer.fit(trial.task, datamodule=trial.data, ckpt_path=resume)
    return trial


def evaluate(config: Config, checkpoint: Path, samples_at_once: int | None) -> ShortRun:
    """Validate a checkpoint on the first samples of the split.

    Args:
        config: of the short run.
        checkpoint: the checkpoint to evaluate.
        samples_at_once: over all processes; None: all, so that there are no padding rows.
    """
    trial, cli = ShortRun(), TrainerCLI(config, [_Quiet(config, checkpoint=checkpoint)])
    cli.trainer.limit_val_batches = 1.0
    trainer: Any = cli.trainer
    trainer.callbacks.append(trial)
    loaders = cli.datamodule.val_dataloader
    cli.datamodule.val_dataloader = lambda: first(loaders(), cli.trainer, samples_at_once)
    (metrics,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, verbose=False)
    trial.metrics = {name: float(value) for name, value in metrics.items()}
    return trial


def predict(config: Config, checkpoint: Path, output: Path) -> int:
    """Write predictions of the first samples; return their number."""
    cli = TrainerCLI(config, [_Quiet(config, checkpoint=checkpoint), PredictionWriter(output)])
    loaders, count = cli.datamodule.predict_dataloader, []

    def loader() -> Loader:
        made = first(loaders(), cli.trainer, batch_size(config))
        count.append(len(made.dataset.dataset))  # type: ignore[attr-defined]
        return made

    cli.datamodule.predict_dataloader = loader
    with contextlib.redirect_stdout(io.StringIO()):  # the writer shows the first rows
        cli.trainer.predict(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, return_predictions=False)
    return count[0]


class _First(Dataset[Any]):
    """First samples of a data set."""

    def __init__(self, dataset: Any, n: int) -> None:
        self.dataset, self.n = dataset, n
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = dataset.__getitems__

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> Any:
        return self.dataset[number]


def first(loader: Any, trainer: Trainer, samples_at_once: int | None) -> Loader:
    """Return a loader of the first samples of a split's loader; of several loaders, the first.

    Raises:
        ValueError: if it is not from bigmodel.data.sampling.
    """
    one = loader[0] if isinstance(loader, list | tuple) else loader
    if not isinstance(one, Loader):
        raise ValueError(f"this {type(one).__name__} was not made by bigmodel.data.sampling.eval_loader")
    whole: Any = one.dataset.dataset  # type: ignore[attr-defined]
    n = min(len(whole), _EVALUATED)
    dataset = _First(whole, n - 1 if n > 1 and n % 4 == 0 else n)  # so that a last batch has padding rows
    return eval_loader(dataset, batch_size=samples_at_once or len(dataset), trainer=trainer)


def has_split(data: Any, name: str) -> bool:
    """True if the data module has a non-empty loader of this name."""
    if not is_overridden(name, data):
        return False
    loader = getattr(data, name)()
    return loader is not None and not (isinstance(loader, list | tuple) and not loader)


def num_rows(batch: Any) -> int:
    """Return B, the number of rows."""
    return len(batch.index)


def sliced(batch: Any, begin: int, end: int | None) -> Any:
    """Return some rows of a batch."""
    return type(batch)(*(part[begin:end] for part in batch))


def _sum_and_count(output: Any) -> tuple[float, float]:
    if not isinstance(output, dict):
        return float(output), float("nan")
    return float(output["loss"]), float(output.get("count", float("nan")))


def _switch_dropout_off(task: nn.Module) -> None:
    """Set to 0 all floats with a dropout name, and the rates of dropout modules."""
    for module in task.modules():
        is_one = "drop" in type(module).__name__.lower()
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (is_one and name in ("p", "rate"))):
                setattr(module, name, 0.0)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(p.detach()).clone().float() for name, p in module.named_parameters() if p.requires_grad}


def _whole(tensor: Any) -> Tensor:
    """Return all parts of a sharded parameter, on each process."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def distance(a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return the distance of two trained nets, relative to the distance of the first from the start (2-norms)."""
    apart = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    way = sum(float((a[name] - start[name]).double().square().sum()) for name in a)
    return float("inf") if not apart < float("inf") else (apart / way) ** 0.5 if way else 0.0 if not apart else 1.0


def state(checkpoint: Path) -> dict[str, Any]:
    """Return the parts of a checkpoint that must be the same in a resumed run."""
    content = read(checkpoint)
    return {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
