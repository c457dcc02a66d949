"""Flags that may be numbers or text: the type of the argument decides, as in `--experiment 2024` or `--data.path 007`."""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_TOP_LEVEL_TEXT = {"experiment", "runs_dir"}


class FlagText(str):
    """Text of a flag that is YAML for a number or a truth value.

    Attributes:
        value: the parsed value.
    """

    value: Any

    @classmethod
    def of(cls, text: str, value: Any) -> Any:
        """Return the text where `value` is a number or a truth value; else the value."""
        if not isinstance(value, bool | int | float):
            return value
        flag = cls(text)
        flag.value = value
        return flag


def resolve_flag_texts(config: Any, owner: Any = None) -> None:
    """Replace each `FlagText` by its text where its argument accepts text but not the value, else by the value; in place.

    Args:
        config: merged configuration, as plain values.
        owner: the class whose arguments it holds; None: the whole configuration, or an untyped mapping.
    """
    if not isinstance(config, dict):
        return
    if isinstance(path := config.get("class_path"), str):
        arguments = config.get("init_args")
        if isinstance(arguments, dict) and any(_has_flag_text(value) for value in arguments.values()):
            resolve_flag_texts(arguments, _import(path))
    for name, value in config.items():
        if isinstance(value, FlagText):
            config[name] = str(value) if _wants_text(owner, name, value.value, str(value)) else value.value
        else:
            resolve_flag_texts(
                value, _trainer() if owner is None and name == "trainer" and _has_flag_text(value) else None
            )


def _has_flag_text(tree: Any) -> bool:
    if isinstance(tree, dict):
        return any(_has_flag_text(value) for value in tree.values())
    return isinstance(tree, FlagText)


def _trainer() -> Any:
    from lightning.pytorch import Trainer

    return Trainer


def _import(path: str) -> Any:
    """Return the class at an import path; None if it cannot be imported, which is reported later."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None


def _wants_text(owner: Any, name: str, value: Any, text: str) -> bool:
    if owner is None:
        return name in _TOP_LEVEL_TEXT
    accepted = _accepted(_annotation(owner, name))
    if text in accepted and value not in accepted:  # of a Literal
        return True
    numbers = {type(value), *([float] if type(value) is int else [])}
    return str in accepted and not numbers & {kind for kind in accepted if isinstance(kind, type)}


def _annotation(owner: Any, name: str) -> Any:
    """Return the type of an argument of a class or function; None if it is not known."""
    for kind in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        function = vars(kind).get("__init__") if inspect.isclass(kind) else kind
        if function is None:
            continue
        try:
            hints = get_type_hints(inspect.unwrap(function))
        except (NameError, TypeError, AttributeError):  # names that only a type checker imports
            continue
        if name in hints:
            return hints[name]
    return None


def _accepted(annotation: Any) -> set[Any]:
    """Return the members of a union, and the values of its literals."""
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(_accepted(member) for member in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return {get_origin(annotation) or annotation} if annotation is not None else set()
