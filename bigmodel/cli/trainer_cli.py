"""`bigmodel fit`, `validate`, `test`, `predict`: LightningCLI with settings that are already merged."""

from __future__ import annotations

import gc
import json
import logging
import re
import secrets
import sys
import time
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bigmodel import run
from bigmodel.checkpoint import AtomicCheckpointIO, find_checkpoint, read
from bigmodel.cli import ClearError, cross_validation, plugins
from bigmodel.cli.class_help import print_class_help
from bigmodel.cli.profiling import make_profiler
from bigmodel.evaluation.predictions import PredictionWriter, check_prediction
from bigmodel.parallel import ShardedStrategy, rendezvous
from bigmodel.run import config as run_config
from bigmodel.run.tracking import WandB
from bigmodel.training.callbacks import DiskSpace, GradientScaling, Preempted, Preemption, Resume, RollbackRequested
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.precision import ChoosePrecision, Undecided, check_precision

# Lightning enables fsspec in jsonargparse, which fetches values such as hf://owner/name to check for a config file.
set_parsing_settings(config_read_mode_fsspec_enabled=False)

_HELP = {
    "fit": """\
bigmodel fit -c EXPERIMENT.yaml [-c MORE.yaml ...] [--KEY VALUE ...]
bigmodel fit --resume RUN [--KEY VALUE ...]

Trains what the YAML files describe, in a new directory under runs/, or goes on with a run that was stopped, with its own
configuration. Later files go on top of earlier ones, and flags on top of all: --model.net.width 512.

Where the data are dealt into folds (--data.folds K) and none of them is chosen (--data.fold I), all are fitted one after
another, in a run directory each, and reported together.

SIGTERM, SIGUSR1 and Ctrl-C end the optimizer step, save a checkpoint and stop; a second Ctrl-C stops at once. Exit status:
0 finished, 85 preempted by a signal, 130 stopped by Ctrl-C, 2 an error that can be mended.
""",
    "validate": """\
bigmodel validate RUN [--checkpoint best|last|FILE] [--KEY VALUE ...]

Evaluates a run's checkpoint on its validation split.
""",
    "test": """\
bigmodel test RUN [--checkpoint best|last|FILE] [--KEY VALUE ...]

Evaluates a run's checkpoint on its test split, and writes the metrics to test.json in the run directory.
""",
    "predict": """\
bigmodel predict RUN [--checkpoint best|last|FILE] [--output FILE] [--data.path PATH] [--KEY VALUE ...]

Predicts with a run's checkpoint what its data module finds to predict, in --data.path for example, and writes a Parquet
table: to --output, or to a new file in RUN/predictions/.
""",
}
_HELP_KEYS = """
  --experiment NAME          names the run directory, runs/NAME/<time>-<id> (default: from the YAML file's name)
  --runs_dir DIR             where runs are (default: runs)
  --seed_everything N        seed of weights, dropout and other draws (default: 0)
  --model ..., --data ...    the task and its data: class_path and init_args
  --trainer.KEY VALUE        Lightning's trainer: max_steps, devices, strategy, val_check_interval (in optimizer steps
                             when it is an integer), profiler (pytorch: a trace of three micro-batches), ...
  --trainer.precision WORD   auto (default: bf16-mixed where this device computes the net faster in it, else 32-true),
                             bf16-mixed, 32-true, 16-mixed, ...; what auto chose stands in the run's config.yaml
  --callbacks.NAME.KEY VALUE step_timer, training_log, progress, ema, swa, compile, activation_checkpointing,
                             anomalies, watchdog, best, last, and your own; `--callbacks.NAME null` switches one off
  --wandb.KEY VALUE          mode (auto, online, offline, disabled), project, entity, tags, log_checkpoint
  --allow_changed_data true  resume although the data differ from those of the checkpoint
  --allow_changed_batch true resume with another --data.batch_size, from the first sample not yet seen
  --print_config             print the resolved configuration, and do nothing

  --model.help [TASK], --data.help [TASK]           what a task and its data take (default: the configured one, or a list)
  --model.net.help [CLASS], --trainer.help, ...     what any class takes (default: the one configured)
"""


class _CLI(LightningCLI):
    """LightningCLI that parses and instantiates; the verb is run separately."""

    def __init__(self, config: run_config.Settings, extra_callbacks: list[Callback]) -> None:
        self.extra_callbacks = extra_callbacks
        # Lightning's type for a precision does not include `auto`.
        trainer = dict(config.get("trainer") or {})
        check_precision(trainer.get("precision"))
        self.auto_precision = trainer.get("precision") == "auto"
        if self.auto_precision:
            config = {**config, "trainer": {**trainer, "precision": None}}
        super().__init__(
            args=config,
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
        )

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
        if not isinstance(options.get("strategy"), ModelParallelStrategy) or isinstance(
            options["strategy"], ShardedStrategy
        ):
            options["plugins"] = [*(options.get("plugins") or []), AtomicCheckpointIO()]
        if not any(isinstance(callback, ProgressBar) for callback in named):
            options["enable_progress_bar"] = False
        if self.auto_precision and not any(isinstance(plugin, Precision) for plugin in options.get("plugins") or []):
            options["plugins"] = [*(options.get("plugins") or []), Undecided()]
        rendezvous.check_strategy(options.get("strategy"))
        try:
            return Trainer(**options)
        except (
            MisconfigurationException,
            ValueError,
            ImportError,
        ) as error:  # devices, accelerator, strategy, precision
            names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
            given = " ".join(
                f"--trainer.{name} {_name(options[name])}" for name in names if options.get(name) is not None
            )
            raise ValueError(f"the trainer cannot be made with {given}: {error}") from error


def _name(value: Any) -> Any:
    return value if isinstance(value, str | int | list) else type(value).__name__


def run_trainer(verb: str, argv: list[str]) -> None:
    """Run one of LightningCLI's verbs.

    Raises:
        ValueError: for any error in the arguments that the user can correct.
    """
    positional, files, flags = run_config.parse_flags(argv)
    own_keys = ["resume", "checkpoint", "print_config", "help", *(["output"] if verb == "predict" else [])]
    own = {key: value for key, value in flags if key in own_keys}
    flags = [(key, value) for key, value in flags if key not in own]
    if "help" in own or "-h" in argv:
        print(_HELP[verb] + _HELP_KEYS, end="")
        return
    if positional and (verb == "fit" or len(positional) > 1):
        hint = " (a run is resumed with --resume RUN, a YAML file is given with -c)" if verb == "fit" else ""
        raise ValueError(f"unexpected argument {positional[-1]!r}{hint}")
    if verb == "fit" and "checkpoint" in own:
        raise ValueError(
            "--checkpoint is for validate, test and predict; `fit --resume RUN` takes the newest checkpoint"
        )

    runs_dir = dict(flags).get("runs_dir", "runs")
    if (
        verb == "fit"
        and "resume" in own
        and (several := cross_validation.find_folds(own["resume"], runs_dir)) is not None
    ):
        cross_validation.resume_folds(
            several, [*(f"--config={file}" for file in files), *(f"--{key}={value}" for key, value in flags)]
        )
        return
    source = own.get("resume") if verb == "fit" else next(iter(positional), None)
    directory = run.find_run(source, runs_dir) if source is not None else None
    which = "last" if verb == "fit" else own.get("checkpoint", "best")
    # The first process verifies the file, and the others use its choice (`run.RunDirectory`, `AtomicCheckpointIO`).
    verify = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    checkpoint = find_checkpoint(directory, which, verify) if directory is not None else None
    if directory is None and not files and not any(key.endswith("help") for key, _ in flags):
        raise ValueError(f"nothing to {verb}: give an experiment with -c FILE.yaml" + _or_a_run(verb))

    merged = merge_settings(files, flags, directory)
    if print_class_help(flags, merged):
        return
    if verb == "fit" and "print_config" not in own and (count := cross_validation.num_folds(merged)) is not None:
        cross_validation.run_folds(argv, count, merged["experiment"], merged["runs_dir"])
        return

    quiet_lightning()
    while True:
        cli, record = _assemble(verb, merged, directory, checkpoint, own)
        if "print_config" in own:
            print(yaml.safe_dump(record.config, sort_keys=False), end="")
            return
        earlier = run_parsed(verb, cli, checkpoint, directory)
        if earlier is None:
            return
        directory, checkpoint = record.directory, earlier
        merged = merge_settings(files, flags, directory)
        del cli, record
        gc.collect()  # free the previous net before another is created


def _assemble(
    verb: str, merged: run_config.Settings, directory: Path | None, checkpoint: Path | None, own: dict[str, Any]
) -> tuple[_CLI, run.RunDirectory]:
    """Return the parsed trainer, task and data, and the callback that records the run."""
    record = run.RunDirectory(merged, directory, checkpoint)
    extra: list[Callback] = [record]
    if verb == "predict" and directory is not None and checkpoint is not None:
        extra.append(PredictionWriter(Path(own.get("output") or _new_predictions(directory, checkpoint))))
    cli = parse(merged, extra)
    record.config = cli.resolved()
    return cli, record


def merge_settings(
    files: list[str], flags: list[tuple[str, Any]], directory: Path | None = None
) -> run_config.Settings:
    """Merge the defaults, a run's own configuration, files and flags, in this order; add the experiment's name."""
    stack = [run_config.read_defaults()]
    if directory is not None:
        stack.append(run_config.read_yaml(directory / "config.yaml"))
    experiments = [plugins.read_experiment(file) for file in files]
    stack += [content for _, content in experiments]
    merged = run_config.layered(stack, [(key, value) for key, value in flags if not key.endswith(".help")])
    merged["experiment"] = merged.get("experiment") or run_config.experiment_name(
        [str(path) for path, _ in experiments]
    )
    trainer = merged.get("trainer") or {}
    if (
        isinstance(strategy := trainer.get("strategy"), str) and "." in strategy
    ):  # an import path, not one of Lightning's names
        trainer["strategy"] = {"class_path": strategy}
    plugins.resolve_words(merged)
    return merged


def _new_predictions(directory: Path, checkpoint: Path) -> Path:
    """Return a new path for a file of predictions."""
    name = f"{checkpoint.stem}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.parquet"
    return directory / "predictions" / name


def _or_a_run(verb: str) -> str:
    return ", or go on with a run by --resume RUN" if verb == "fit" else ", or name a run"


def parse(merged: run_config.Settings, extra_callbacks: list[Callback]) -> _CLI:
    """Create trainer, task and data from settings.

    Raises:
        ClearError: for settings that cannot be parsed.
    """
    plugins.check_classes(merged)
    try:
        return _CLI(merged, extra_callbacks)
    except (ArgumentError, ValueError) as error:
        raise ClearError(_readable(str(error))) from error


def _readable(message: str) -> str:
    """Convert an error message of jsonargparse to `--flag: problem` lines, without its internal terms."""
    keys: list[tuple[int, str]] = []
    problems: list[str] = []
    noise = "Does not validate|Subtypes:|Errors:|Given value|Problem with given class_path"
    noise += "|Expected a <class 'NoneType'>|Expected a path|Subclass types expect|a class path|a dict with"
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip())
        text = re.sub(r"\.? Got value: .*", "", line.strip().removeprefix("- "))
        text = re.sub(r"^Type .* expects (a function or a callable class: )?", "", text)
        text = re.sub(r"^the following arguments are required: (.*)", r"\1 must be given", text)
        while named := re.match(r"Parser key \"([\w.]+)\":(.*)", text):
            keys = [(depth, key) for depth, key in keys if depth < indent] + [(indent, named[1])]
            text, indent = named[2].strip(), indent + 1
        if text and not re.match(noise, text):
            flag = "--" + ".".join(key for _, key in keys)
            problems.append(f"{flag}: {text}" if keys else text)
    hints = {line.split(":")[0] for line in problems if "is not accepted" in line}
    problems += [f"`{flag}.help` shows what it takes" for flag in sorted(hints) if flag.startswith("--")]
    return "\n  ".join(dict.fromkeys(problems)) or message


def run_parsed(verb: str, cli: _CLI, checkpoint: Path | None, directory: Path | None) -> Path | None:
    """Run the verb with the trainer. Errors that the user can correct become a ClearError until the run has begun.

    Returns:
        The checkpoint from which the fit continues after a rollback (see `Anomalies`); None: it is done.
    """
    trainer, task, data = cli.trainer, cli.model, cli.datamodule
    record = get_callback(trainer, run.RunDirectory)
    assert record is not None
    rendezvous.check_world_size(trainer)
    if trainer.world_size > 1:
        rendezvous.install_rendezvous(trainer, cli.resolved())
    try:
        if verb == "fit":
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint)
            return None
        if checkpoint is None:
            raise ValueError(f"nothing to {verb}: name a run, as in `bigmodel {verb} RUN`")
        if verb == "predict":
            check_prediction(task, data)
        if restore := getattr(
            task, "restore_metadata", None
        ):  # optional: restores saved state that data or net depend on
            restore(read(checkpoint, verify=False, whole=False))
        quiet = {"return_predictions": False} if verb == "predict" else {"verbose": False}
        metrics = getattr(trainer, verb)(task, datamodule=data, ckpt_path=checkpoint, **quiet)
    except RollbackRequested as cause:
        trainer.strategy.barrier()  # until the first process has finished writing
        return record.go_back(cause)
    except Preempted as stopped:
        trainer.strategy.barrier()  # until the first process has updated its loggers: a launcher kills all when one exits
        # Lightning's own launcher kills the rest, unless the processes that it started exit with 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        sys.exit(0 if trainer.global_rank > 0 and isinstance(environment, LightningEnvironment) else stopped.exit_code)
    except SystemExit as error:  # Lightning converts Ctrl-C to it
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    except MisconfigurationException as error:  # Lightning's error for a wrong setting
        raise ClearError(str(error)) from error
    except (ValueError, OSError) as error:
        if record.started:
            raise
        raise ClearError(str(error)) from error  # data, sizes, configuration: before the run has begun
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
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(
            f"{checkpoint} is of another architecture or vocabulary than this configuration describes:\n{error}"
        ) from error
    if verb in ("validate", "test") and trainer.is_global_zero and directory is not None:
        values = {name: value for row in metrics for name, value in row.items()}
        for name, value in values.items():
            print(f"{name:32} {value:.6g}")
        text = json.dumps({"checkpoint": str(checkpoint), **values}, indent=2)
        (directory / f"{verb}.json").write_text(text + "\n")
    return None


def quiet_lightning() -> None:
    """Suppress Lightning's informational messages and known harmless warnings; other warnings remain."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers which may be a bottleneck.*",  # batches are read from memory maps
        ".*Total length of `list` across ranks is zero.*",  # no split for validation
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen parts are intended
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*is smaller than the logging interval.*",
        ".*overridden `on_before_batch_transfer` in `LightningModule`.*",  # allowed for a task
        ".*torch.distributed.nn.functional.all_gather is deprecated.*",  # called by Lightning
    ):
        warnings.filterwarnings("ignore", message=message)
