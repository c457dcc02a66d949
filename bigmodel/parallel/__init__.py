"""Large nets: built without memory, found in their blocks, and made to need less memory and time."""

from bigmodel.parallel.deferred import Initialization, deferred

__all__ = ["Initialization", "deferred"]
