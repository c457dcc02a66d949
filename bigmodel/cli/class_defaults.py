"""A class that is named in place of a signature's default class takes its own defaults.

jsonargparse hands the arguments of a default class to the class that replaces it, where both have them: RMSprop in place
of AdamW would get the learning rate and the weight decay of AdamW.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import yaml

from bigmodel.cli.plugins import find_class


def fill_class_defaults(settings: Any) -> None:
    """Write into each block that replaces a default class the defaults that would otherwise be the other's; in place.

    Args:
        settings: merged settings, as plain values.
    """
    if isinstance(settings, list):
        for value in settings:
            fill_class_defaults(value)
    if not isinstance(settings, dict):
        return
    path, arguments = settings.get("class_path"), settings.get("init_args")
    if isinstance(path, str) and "." in path and isinstance(arguments, dict):
        defaults = _defaults(path)
        for name, value in arguments.items():
            replaced = defaults.get(name)
            if isinstance(replaced, dict) and "class_path" in replaced:
                arguments[name] = _with_own_defaults(value, replaced["class_path"])
    for value in settings.values():
        fill_class_defaults(value)


def _with_own_defaults(value: Any, replaced: str) -> Any:
    """Return a block, or the path of a class, as a block with its own defaults of arguments that `replaced` has too."""
    block: dict[str, Any] = (
        {"class_path": value} if isinstance(value, str) else value if isinstance(value, dict) else {}
    )
    path = block.get("class_path")
    if not isinstance(path, str) or "." not in path or _is_same(path, replaced):
        return value
    shared = {key: own for key, own in _defaults(path).items() if key in _defaults(replaced)}
    return {**block, "init_args": {**shared, **(block.get("init_args") or {})}}


def _is_same(path: str, other: str) -> bool:
    return bool(find_class(path) is find_class(other))


@functools.cache
def _defaults(path: str) -> dict[str, Any]:
    """Return a class's optional arguments and their defaults, as plain values; nothing if the class cannot be imported."""
    from jsonargparse import ArgumentParser

    if not inspect.isclass(found := find_class(path)):
        return {}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(found, "block", fail_untyped=False)
    plain: dict[str, Any] = yaml.safe_load(parser.dump(parser.get_defaults(), skip_validation=True, skip_unset=False))
    required = {name for name, given in inspect.signature(found).parameters.items() if given.default is given.empty}
    return {name: value for name, value in (plain.get("block") or {}).items() if name not in required}
