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

import copy
import gc
import re
import secrets
import time
from argparse import ArgumentError
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
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
from bigmodel.cli.monitors import CheckMonitors
from bigmodel.cli.parse_errors import format_parse_error
from bigmodel.cli.profiling import make_profiler
from bigmodel.cli.run_verb import run_verb
from bigmodel.cli.setting_checks import check_settings
from bigmodel.data.text import print_text
from bigmodel.evaluation.predictions import PredictionWriter
from bigmodel.parallel import ShardedStrategy, rendezvous
from bigmodel.run.added_arguments import complete
from bigmodel.run.config import Config, experiment_name, layered, parse_flags, read_defaults, read_yaml
from bigmodel.run.secrets import MASK, check_masked, mask_secrets
from bigmodel.run.tracking import WandB
from bigmodel.run.trust import check_imports, imported_paths, remember, restricted_imports, trust_packages_of
from bigmodel.training.callbacks import DiskSpace, GradientScaling, Preemption, Resume
from bigmodel.training.precision import ChoosePrecision, Undecided, check_precision

# Lightning enables fsspec in jsonargparse, which fetches values such as hf://owner/name to check for a config file.
set_parsing_settings(config_read_mode_fsspec_enabled=False)
# Keys of a configuration, and flags that are none.
_TOP_LEVEL = [*read_defaults(), "model", "data", "resume", "checkpoint", "output", "print_config"]


class TrainerCLI(LightningCLI):
    """LightningCLI that parses a merged configuration and instantiates trainer, task and data; it runs no verb.

    Args:
        config: from `merge_config`.
        extra_callbacks: callbacks that are not in the configuration.
        saved: part of it is the configuration of a run, which may come from somebody else; see `run.trust`.
        instantiate: create trainer, task and data; False: only parse.
        given: a task and its data that exist already, in place of those that the configuration names.

    Raises:
        ClearError: for a configuration that cannot be parsed.
    """

    def __init__(
        self,
        config: Config,
        extra_callbacks: list[Callback],
        *,
        saved: bool = False,
        instantiate: bool = True,
        given: tuple[LightningModule, LightningDataModule | None] | None = None,
    ) -> None:
        plugins.check_classes(config, [Path.cwd()])
        check_settings(config)
        if not saved:  # a run's configuration holds every default; text in it must not be imported
            fill_class_defaults(config)
        self.extra_callbacks, self.saved, self.creates = extra_callbacks, saved, instantiate
        # Lightning's type for a precision does not include `auto`.
        trainer = dict(config.get("trainer") or {})
        self.auto_precision = trainer.get("precision") == "auto"
        if self.auto_precision:
            config = {**config, "trainer": {**trainer, "precision": None}}
        try:
            check_precision(trainer.get("precision"))
            with restricted_imports(config) if saved else nullcontext():
                super().__init__(
                    **({} if given is None else _returning(*given)),
                    args=config,
                    run=False,
                    save_config_callback=None,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    seed_everything_default=0,
                    parser_kwargs={"exit_on_error": False},
                )
        except (ArgumentError, ValueError) as error:
            raise ClearError(_name_callbacks(format_parse_error(str(error), _TOP_LEVEL), config)) from error

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
        plain = copy.deepcopy(args)  # which is changed
        self.config = parser.parse_object(args)
        if self.creates and not self.saved:
            remember(imported_paths(plain, self.config))

    def resolved(self) -> dict[str, Any]:
        """Return the configuration as plain values, with every default filled in."""
        config: dict[str, Any] = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        config.pop("config", None)
        if self.auto_precision:
            config["trainer"]["precision"] = "auto"
        return config

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        callbacks: dict[str, Callback | None] = self.config_init.get("callbacks") or {}
        by_name = {name: callback for name, callback in callbacks.items() if callback is not None}
        named = list(by_name.values())
        # Gradients are scaled first, and callbacks that record a step run before those that save it.
        scaling = GradientScaling()
        always: list[Callback] = [
            scaling,
            ChoosePrecision(),
            Resume(int(self.config.seed_everything), self.config.allow_changed_data, self.config.allow_changed_batch),
            *self.extra_callbacks,
            DiskSpace(),
            CheckMonitors(by_name),
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
            trainer = Trainer(**options)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            given = {
                name: options.get(name) for name in ("accelerator", "devices", "num_nodes", "strategy", "precision")
            }
            flags = [
                f"--trainer.{name} {value if isinstance(value, str | int | list) else type(value).__name__}"
                for name, value in given.items()
                if value is not None
            ]
            raise ValueError(f"the trainer cannot be created with {' '.join(flags)}: {error}") from error
        if not self.model.automatic_optimization:  # before Lightning refuses to clip under manual optimization
            scaling.take_clipping(trainer, self.model)
        return trainer


def _returning(task: LightningModule, data: LightningDataModule | None) -> dict[str, Any]:
    """Return LightningCLI's arguments for a task and data that exist already: classes whose only objects they are."""

    class GivenTask(LightningModule):
        def __new__(cls) -> Any:
            return task

        def __init__(self) -> None:
            """Take no arguments."""

    class GivenData(LightningDataModule):
        def __new__(cls) -> Any:
            return data

        def __init__(self) -> None:
            """Take no arguments."""

    return {"model_class": GivenTask} | ({} if data is None else {"datamodule_class": GivenData})


def _name_callbacks(message: str, config: Config) -> str:
    """Insert the callback's name into a message about `--callbacks`, from which jsonargparse omits it."""
    callbacks = config.get("callbacks")
    option = re.match(r"--callbacks(?:: Option '(\w+)'|\.(\w+))", message)
    if option is None or not isinstance(callbacks, dict):
        return message
    wanted = option[1] or option[2]
    names = [
        n for n, block in callbacks.items() if isinstance(block, dict) and wanted in (block.get("init_args") or {})
    ]
    return message.replace("--callbacks", f"--callbacks.{names[0]}") if len(names) == 1 else message


def run_trainer(verb: str, argv: list[str]) -> None:
    """Run one of LightningCLI's verbs.

    Raises:
        ValueError: for any error in the arguments that the user can correct.
    """
    positional, files, flags = parse_flags(argv)
    own_keys = ["resume", "checkpoint", "print_config", *(["output"] if verb == "predict" else [])]
    own = {key: value for key, value in flags if key in own_keys}
    flags = [(key, value) for key, value in flags if key not in own]
    if verb == "predict" and len(positional) == 2 and "data.path" not in dict(flags):
        flags.append(("data.path", positional.pop()))
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
        record.config, secret = mask_secrets(cli.resolved())
        if secret and verb == "fit":
            rank_zero_only(print_text)(
                f"secret     --{', --'.join(secret)}: written as {MASK} to the run directory and to W&B"
            )
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
    if directory is not None:
        trust_packages_of(layered([content for _, content in experiments], given))
    merged = layered(layers, given)
    merged["experiment"] = merged.get("experiment") or experiment_name([str(path) for path, _ in experiments])
    for key in ("model", "data"):
        if isinstance(merged.get(key), str):  # a YAML file that only names the class
            merged[key] = {"class_path": merged[key]}
    trainer = merged.get("trainer") or {}
    if isinstance(strategy := trainer.get("strategy"), str) and "." in strategy:  # not one of Lightning's names
        trainer["strategy"] = {"class_path": strategy}
    check_masked(merged)
    plugins.check_classes(merged, [*(path.parent for path, _ in experiments), Path.cwd()])
    plugins.resolve_aliases(merged)
    return merged


def _new_predictions(directory: Path, checkpoint: Path) -> Path:
    """Return a new path for a file of predictions."""
    name = f"{checkpoint.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.parquet"
    return directory / "predictions" / name
