"""Clocks that divide the time of a run among its parts: on the host, and on a GPU without synchronizing."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch

PARTS = ("data", "forward", "backward", "communication", "optimizer", "validation", "checkpoint", "other")


class Clock(Protocol):
    """Attributes elapsed time to one part at a time."""

    part: str

    def mark(self, part: str) -> None:
        """Attribute time to this part from now on."""

    def reset(self) -> None:
        """Discard the times measured so far and continue with part `other`."""

    def read(self) -> dict[str, float]:
        """Return the seconds of each part until now."""

    def so_far(self, part: str) -> float:
        """Return the seconds of a part, as far as they are available without synchronizing."""


class HostClock:
    """Measures with the clock of this process."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self.part, self._since = "other", time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[self.part] += now - self._since
        self.part, self._since = part, now

    def read(self) -> dict[str, float]:
        self.mark(self.part)
        return dict(self._seconds)

    def so_far(self, part: str) -> float:
        return self._seconds[part]


class DeviceClock:
    """Measures with events in the current CUDA stream, each read after it has completed.

    Pending events are stored; their number is bounded, because the CUDA launch queue (about a thousand entries) blocks
    the process when it is full.
    """

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self.reset()

    def reset(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: deque[tuple[str, torch.cuda.Event]] = deque()  # the part that begins at each event
        self.mark("other")

    def mark(self, part: str) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        self.part = part
        self._marks.append((part, event))
        if len(self._marks) > 2 and self._marks[1][1].query():
            self._add_first()

    def _add_first(self) -> None:
        part, event = self._marks.popleft()
        self._seconds[part] += event.elapsed_time(self._marks[0][1]) / 1e3
        self._free.append(event)

    def read(self) -> dict[str, float]:
        self.mark(self.part)
        self._marks[-1][1].synchronize()
        while len(self._marks) > 1:
            self._add_first()
        return dict(self._seconds)

    def so_far(self, part: str) -> float:
        while len(self._marks) > 1 and self._marks[1][1].query():
            self._add_first()
        return self._seconds[part]
