"""Research framework on Lightning for the whole life of a large model, with plug-in tasks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "fit", "load", "load_data", "sizes"]

if TYPE_CHECKING:
    from bigmodel.api import fit
    from bigmodel.run import load, load_data, sizes


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package that imports names at their first use, because torch and Lightning are slow.

    Args:
        package: the package.
        modules: names, separated by spaces, by the module that defines them.
    """
    defined_in = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in defined_in:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(defined_in[name]), name)

    return get


__getattr__ = lazy_attributes(__name__, {"bigmodel.api": "fit", "bigmodel.run": "load load_data sizes"})
