"""From the command line to a running trainer, for `fit`, `validate`, `test` and `predict`.

1. `merge_config` merges defaults.yaml, a run's config.yaml, the files of `-c` and the flags, as plain mappings.
2. `run.trust` checks the import paths of a run's config.yaml; `TrainerCLI`, that the packages of all classes are
   installed (`plugins.check_classes`).
3. jsonargparse, called by LightningCLI, checks types and fills in defaults; `TrainerCLI.resolved` is the result.
4. LightningCLI instantiates trainer, task and data; the task keeps `net` as a factory of its arguments.
5. `run_verb` calls `trainer.fit`; the task's `configure_model` calls the factory with the sizes that the data define.

Flags are merged before jsonargparse parses them: if a flag replaces a class, jsonargparse would retain its arguments.
"""

from __future__ import annotations

import gc
import secrets
import time
from argparse import ArgumentError
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bigmodel import run
from bigmodel.checkpoint import AtomicCheckpointIO, find_checkpoint
from bigmodel.cli import ClearError, cross_validation, plugins
from bigmodel.cli.class_defaults import fill_class_defaults
from bigmodel.cli.class_help import print_class_help
from bigmodel.cli.lightning_warnings import quiet_lightning
from bigmodel.cli.parse_errors import format_parse_error
from bigmodel.cli.profiling import make_profiler
from bigmodel.cli.run_verb import run_verb
from bigmodel.cli.trainer_help import HELP
from bigmodel.evaluation.predictions import PredictionWriter
from bigmodel.parallel import ShardedStrategy, rendezvous
from bigmodel.run.added_arguments import complete
from bigmodel.run.config import Config, experiment_name, layered, parse_flags, read_defaults, read_yaml
from bigmodel.run.tracking import WandB
from bigmodel.run.trust import check_imports, remember, restricted_imports
from bigmodel.training.callbacks import DiskSpace, GradientScaling, Preemption, Resume
from bigmodel.training.precision import ChoosePrecision, Undecided, check_precision

# Lightning enables fsspec in jsonargparse, which fetches values such as hf://owner/name to check for a config file.
set_parsing_settings(config_read_mode_fsspec_enabled=False)


class TrainerCLI(LightningCLI):
    """LightningCLI that parses a merged configuration and instantiates trainer, task and data; it runs no verb.

    Args:
        config: from `merge_config`.
        extra_callbacks: callbacks that are not in the configuration.
        saved: part of it is the configuration of a run, which may come from somebody else; see `run.trust`.
        instantiate: create trainer, task and data; False: only parse.

    Raises:
        ClearError: for a configuration that cannot be parsed.
    """

    def __init__(
        self, config: Config, extra_callbacks: list[Callback], *, saved: bool = False, instantiate: bool = True
    ) -> None:
        plugins.check_classes(config)
        fill_class_defaults(config)
        if instantiate and not saved:
            remember(config)
        self.extra_callbacks, self.creates = extra_callbacks, instantiate
        # Lightning's type for a precision does not include `auto`.
        trainer = dict(config.get("trainer") or {})
        self.auto_precision = trainer.get("precision") == "auto"
        if self.auto_precision:
            config = {**config, "trainer": {**trainer, "precision": None}}
        try:
            check_precision(trainer.get("precision"))
            with restricted_imports() if saved else nullcontext():
                super().__init__(
                    args=config,
                    run=False,
                    save_config_callback=None,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    seed_everything_default=0,
                    parser_kwargs={"exit_on_error": False},
                )
        except (ArgumentError, ValueError) as error:
            raise ClearError(format_parse_error(str(error))) from error

    def instantiate_classes(self) -> None:
        if self.creates:
            super().instantiate_classes()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--experiment", type=str, default="unnamed")
        parser.add_argument("--runs_dir", type=str, default="runs")
        parser.add_argument("--allow_changed_data", type=bool, default=False)
        parser.add_argument("--allow_changed_batch", type=bool, default=False)
        parser.add_argument("--callbacks", type=dict[str, Callback | None], default={})
        parser.add_argument("--wandb", type=WandB, default=WandB())

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_object(args)

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain values, with every default filled in."""
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        config.pop("config", None)
        if self.auto_precision:
            config["trainer"]["precision"] = "auto"
        return config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        named = [callback for callback in (self.config_init.get("callbacks") or {}).values() if callback is not None]
        # Gradients are scaled first, and callbacks that record a step run before those that save it.
        always: list[Callback] = [
            GradientScaling(),
            ChoosePrecision(),
            Resume(int(self.config.seed_everything), self.config.allow_changed_data, self.config.allow_changed_batch),
            *self.extra_callbacks,
            DiskSpace(),
        ]
        options = dict(self.config_init["trainer"])
        options["profiler"] = make_profiler(options.get("profiler"))
        options["callbacks"] = [*always, *named, *(options.get("callbacks") or []), Preemption()]
        if options.get("logger") in (None, True):  # the run directory has its own
            options["logger"] = False
        strategy = options.get("strategy")
        if isinstance(strategy, ShardedStrategy) or not isinstance(strategy, ModelParallelStrategy):
            options["plugins"] = [*(options.get("plugins") or []), AtomicCheckpointIO()]
        if not any(isinstance(callback, ProgressBar) for callback in named):
            options["enable_progress_bar"] = False
        if self.auto_precision and not any(isinstance(plugin, Precision) for plugin in options.get("plugins") or []):
            options["plugins"] = [*(options.get("plugins") or []), Undecided()]
        rendezvous.check_strategy(strategy)
        try:
            return Trainer(**options)
        except (MisconfigurationException, ValueError, ImportError) as error:
            given = {
                name: options.get(name) for name in ("accelerator", "devices", "num_nodes", "strategy", "precision")
            }
            flags = [
                f"--trainer.{name} {value if isinstance(value, str | int | list) else type(value).__name__}"
                for name, value in given.items()
                if value is not None
            ]
            raise ValueError(f"the trainer cannot be created with {' '.join(flags)}: {error}") from error


def run_trainer(verb: str, argv: list[str]) -> None:
    """Run one of LightningCLI's verbs.

    Raises:
        ValueError: for any error in the arguments that the user can correct.
    """
    positional, files, flags = parse_flags(argv)
    own_keys = ["resume", "checkpoint", "print_config", "help", *(["output"] if verb == "predict" else [])]
    own = {key: value for key, value in flags if key in own_keys}
    flags = [(key, value) for key, value in flags if key not in own]
    if "help" in own or "-h" in argv:
        print(HELP[verb], end="")
        return
    _check_arguments(verb, positional, own)
    runs_dir = dict(flags).get("runs_dir", "runs")
    source = own.get("resume") if verb == "fit" else next(iter(positional), None)
    if verb == "fit" and source is not None and (folds := cross_validation.find_folds(source, runs_dir)) is not None:
        more = [*(f"--config={file}" for file in files), *(f"--{key}={value}" for key, value in flags)]
        cross_validation.resume_folds(folds, more)
        return
    directory = run.find_run(source, runs_dir) if source is not None else None
    checkpoint = None
    if directory is not None:
        # The first process verifies the file, and all processes use its choice (`run.RunDirectory`, `AtomicCheckpointIO`).
        verify = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        checkpoint = find_checkpoint(directory, "last" if verb == "fit" else own.get("checkpoint", "best"), verify)
    elif not files and not any(key.endswith("help") for key, _ in flags):
        alternative = "resume a run with --resume RUN" if verb == "fit" else "name a run"
        raise ValueError(f"nothing to {verb}: give an experiment with -c FILE.yaml, or {alternative}")

    merged = merge_config(files, flags, directory)
    if print_class_help(flags, merged):
        return
    if verb == "fit" and "print_config" not in own and (count := cross_validation.num_folds(merged)) is not None:
        cross_validation.run_folds(argv, count, merged["experiment"], merged["runs_dir"])
        return

    quiet_lightning()
    while True:
        record = run.RunDirectory(merged, directory, checkpoint)
        extra: list[Callback] = [record]
        if verb == "predict" and directory is not None and checkpoint is not None:
            extra.append(PredictionWriter(Path(own.get("output") or _new_predictions(directory, checkpoint))))
        cli = TrainerCLI(merged, extra, saved=directory is not None, instantiate="print_config" not in own)
        record.config = cli.resolved()
        if "print_config" in own:
            print(yaml.safe_dump(record.config, sort_keys=False), end="")
            return
        earlier = run_verb(verb, cli, checkpoint, directory)
        if earlier is None:
            return
        directory, checkpoint = record.directory, earlier
        merged = merge_config(files, flags, directory)
        del cli, record, extra
        gc.collect()  # free the previous net before another is created


def _check_arguments(verb: str, positional: list[str], own: dict[str, Any]) -> None:
    """Raise ValueError for arguments that the verb does not accept."""
    if positional and (verb == "fit" or len(positional) > 1):
        hint = " (a run is resumed with --resume RUN, a YAML file is given with -c)" if verb == "fit" else ""
        raise ValueError(f"unexpected argument {positional[-1]!r}{hint}")
    if verb == "fit" and "checkpoint" in own:
        raise ValueError(
            "--checkpoint is for validate, test and predict; `fit --resume RUN` takes the newest checkpoint"
        )


def merge_config(files: list[str], flags: list[tuple[str, Any]], directory: Path | None = None) -> Config:
    """Merge the defaults, a run's own configuration, files and flags, in this order; add the experiment's name."""
    layers = [read_defaults()]
    if directory is not None:
        saved = read_yaml(directory / "config.yaml")
        check_imports(saved)
        complete(saved)
        layers.append(saved)
    experiments = [plugins.read_experiment(file) for file in files]
    layers += [content for _, content in experiments]
    given = [(key, value) for key, value in flags if not key.endswith(".help")]
    if directory is not None:  # what a person types beside a run's configuration is allowed
        remember(layered([content for _, content in experiments], given))
    merged = layered(layers, given)
    merged["experiment"] = merged.get("experiment") or experiment_name([str(path) for path, _ in experiments])
    trainer = merged.get("trainer") or {}
    if isinstance(strategy := trainer.get("strategy"), str) and "." in strategy:  # not one of Lightning's names
        trainer["strategy"] = {"class_path": strategy}
    plugins.resolve_aliases(merged)
    return merged


def _new_predictions(directory: Path, checkpoint: Path) -> Path:
    """Return a new path for a file of predictions."""
    name = f"{checkpoint.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.parquet"
    return directory / "predictions" / name
