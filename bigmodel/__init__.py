"""A research framework on Lightning for the whole life of a large model, with plug-in tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "sizes"]

if TYPE_CHECKING:
    from bigmodel.run import load, sizes


def __getattr__(name: str) -> Any:
    """`load` and `sizes` live in `bigmodel.run`, which imports Lightning: that waits until they are used."""
    if name in ("load", "sizes"):
        from bigmodel import run

        return getattr(run, name)
    raise AttributeError(f"module 'bigmodel' has no attribute {name!r}")
