"""A research framework on Lightning for the whole life of a large model, with plug-in tasks."""

__version__ = "0.1.0"
