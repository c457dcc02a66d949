"""Checks of a merged configuration that neither jsonargparse nor Lightning makes, before any object is created."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

from bigmodel.cli.plugins import import_class
from bigmodel.data.text import did_you_mean
from bigmodel.run.config import Config, read_defaults

# Trainer's settings that divide by zero, or leave nothing to train.
_AT_LEAST_ONE = ("log_every_n_steps", "val_check_interval", "check_val_every_n_epoch")
_NOTHING_TO_TRAIN = ("max_steps", "max_epochs", "limit_train_batches")


def check_settings(config: Config) -> None:
    """Check the groups, the trainer's numbers, the names of callbacks, and arguments set to null.

    Raises:
        ValueError: for the first setting that is not accepted.
    """
    for group, hint in (("trainer", ""), ("wandb", "; set --wandb.mode disabled to switch tracking off")):
        if not isinstance(config.get(group, {}), dict):
            raise ValueError(
                f"--{group} {_shown(config[group])}: must be a group of settings, --{group}.KEY VALUE{hint}"
            )
    _check_trainer(config.get("trainer") or {})
    _check_callbacks(config.get("callbacks"))
    for group in ("model", "data"):
        _check_null(config.get(group), group)


def _check_trainer(trainer: Config) -> None:
    for name in (*_AT_LEAST_ONE, *_NOTHING_TO_TRAIN):
        value = trainer.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == 0:
            meaning = "nothing would be trained; " if name in _NOTHING_TO_TRAIN else ""
            accepted = "a number above 0" if name in ("val_check_interval", "limit_train_batches") else "at least 1"
            raise ValueError(f"--trainer.{name} {value}: {meaning}must be {accepted}")
    clip = trainer.get("gradient_clip_val")
    if isinstance(clip, int | float) and clip < 0:
        raise ValueError(f"--trainer.gradient_clip_val {clip}: must not be negative; null switches clipping off")


def _check_callbacks(callbacks: Any) -> None:
    if not isinstance(callbacks, dict):
        return
    for name, block in callbacks.items():
        if isinstance(block, dict) and "class_path" not in block:
            default = read_defaults()["callbacks"]
            if name in default:  # off by default
                raise ValueError(
                    f"--callbacks.{name} is off: switch it on with --callbacks.{name} CLASS, see defaults.yaml"
                )
            raise ValueError(
                f"--callbacks.{name}: there is no callback of this name{did_you_mean(name, default)}"
                f" Named are {', '.join(default)}; add another with --callbacks.{name} CLASS"
            )


def _check_null(block: Any, key: str) -> None:
    """Raise for an argument that is null where its annotation and its default are not."""
    if not isinstance(block, dict) or not isinstance(path := block.get("class_path"), str) or "." not in path:
        return
    arguments = block.get("init_args") or {}
    required = _without_null(path) if None in arguments.values() else ()
    for name, value in arguments.items():
        if value is None and name in required:
            raise ValueError(f"--{key}.{name} null: a value is needed; leave it out for its default, or give a class")
        _check_null(value, f"{key}.{name}")


def _without_null(path: str) -> list[str]:
    """Return the arguments of a class that do not accept None; nothing if it cannot be imported."""
    try:
        found = import_class(path)
        hints = typing.get_type_hints(found.__init__)
        given = inspect.signature(found).parameters
    except Exception:  # refused later, with a message
        return []
    return [name for name in hints if name in given and given[name].default is not None and not _optional(hints[name])]


def _optional(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_optional, typing.get_args(hint)))
    return hint in (None, type(None), Any) or isinstance(hint, str | typing.TypeVar)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
