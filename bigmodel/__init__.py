"""Research framework on Lightning for the whole life of a large model, with plug-in tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_data", "sizes"]

if TYPE_CHECKING:
    from bigmodel.run import load, load_data, sizes


def __getattr__(name: str) -> Any:
    """Import from `bigmodel.run` lazily, because it imports Lightning."""
    if name in ("load", "load_data", "sizes"):
        from bigmodel import run

        return getattr(run, name)
    raise AttributeError(f"module 'bigmodel' has no attribute {name!r}")
