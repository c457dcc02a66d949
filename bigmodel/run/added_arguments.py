"""Arguments that are newer than some runs, with the values that leave these runs as they were.

The default of such an argument is that of new runs.
"""

from __future__ import annotations

from typing import Any

_CALLBACKS = {"bigmodel.training.callbacks.EMA": {"warmup": False}}  # by class


def complete(config: dict[str, Any]) -> None:
    """Add missing arguments to the configuration of a run, in place."""
    for callback in (config.get("callbacks") or {}).values():
        if isinstance(callback, dict):
            for path, arguments in _CALLBACKS.items():
                if callback.get("class_path") in (path, f"{path.rpartition('.')[0]}.ema.{path.rpartition('.')[2]}"):
                    callback["init_args"] = {**arguments, **(callback.get("init_args") or {})}
