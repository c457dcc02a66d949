"""A comparison: several ways of doing the same work, and how good one of them must be."""

from __future__ import annotations

import sys
from typing import Literal, NamedTuple

PYTHON = [sys.executable, "-m"]  # and a module
ONE_THREAD = ["env", "OMP_NUM_THREADS=1"]


class Bound(NamedTuple):
    """Bound of a median figure, or of its ratio to that of another implementation."""

    way: str
    over: str | None
    direction: Literal["at least", "at most"]
    limit: float


class Row(NamedTuple):
    """One comparison: its ways by name, each a command that prints its figure."""

    name: str
    title: str
    ways: dict[str, list[str]]
    bounds: list[Bound]
    times: int = 1  # --rounds is multiplied by this, for short and noisy ways
    once: bool = False  # not by --rounds, for what does not vary or repeats itself
    optional: bool = False  # only when asked for
    figure: str = r'\{"figure": (.*)\}'  # how a way prints it
