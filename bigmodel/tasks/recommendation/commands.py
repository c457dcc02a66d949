"""`bigmodel recommend`: the best items for a user of the data, or for a history."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bigmodel.data.text import did_you_mean, print_text
from bigmodel.run.config import flag_value, parse_flags

_HELP = """\
bigmodel recommend RUN --user ID [--k 10] [--checkpoint best|last|FILE]
bigmodel recommend RUN --history ID,ID,... [--times TIME,TIME,...] [--k 10] [--checkpoint best|last|FILE]

Prints the k best items of a trained recommender with their scores, the best first: for a user of the run's data, or for a
history, the items that somebody chose, in this order; an id that contains a comma is in double quotes. Items of the
history are excluded, unless the run has --model.seen keep.

--times are for a net that reads times (HSTU), one for each item of the history: seconds since 1970, or dates in ISO format
(by default UTC). Without them, items are assumed to be evenly spaced, by the median gap in the training data.
"""
_FLAGS = {"user", "history", "times", "k", "checkpoint", "runs_dir"}


def run_recommend(argv: list[str]) -> None:
    """Load a run's task and print its recommendations.

    Raises:
        ValueError: for inconsistent arguments, a run that cannot recommend, an unknown user or item.
    """
    positional, _, flags = parse_flags(argv)
    given = dict(flags)
    if "help" in given or "-h" in argv:
        print_text(_HELP, end="")
        return
    if len(positional) != 1 or ("user" in given) == ("history" in given):
        raise ValueError(
            "one run is needed, and either --user ID or --history ID,ID,...; see `bigmodel recommend --help`"
        )
    if unknown := sorted(given.keys() - _FLAGS):
        accepted = ", --".join(sorted(_FLAGS))
        raise ValueError(f"unknown flag --{unknown[0]}; the flags are --{accepted}{did_you_mean(unknown[0], _FLAGS)}")
    k = flag_value("k", given.get("k", "10"))
    if not isinstance(k, int):
        raise ValueError(f"--k {k}: must be a whole number")
    if "times" in given and "history" not in given:
        raise ValueError("--times needs --history; the times of a --user are in the data")
    times = [_seconds(one) for one in _listed(given["times"])] if "times" in given else None

    from bigmodel import run
    from bigmodel.protocols import SupportsRecommend

    runs_dir = given.get("runs_dir", "runs")
    task: Any = run.load(positional[0], given.get("checkpoint", "best"), runs_dir=runs_dir)
    if not isinstance(task, SupportsRecommend):
        raise ValueError(
            f"{positional[0]}: {type(task).__name__} cannot recommend items (bigmodel.protocols.SupportsRecommend)"
        )
    if "history" in given:
        entries = task.recommend(_listed(given["history"]), k, times)
    else:
        data: Any = run.load_data(positional[0], runs_dir=runs_dir)
        try:
            batch = data.user(given["user"], task.item_ids)
        except ValueError as error:
            raise ValueError(f"{error}; for a user who is not in the data, set --history ID,ID,...") from error
        entries = task.recommend_to(batch, k)
    print_text("\n".join(_lines(entries)))
    if len(entries) < k:
        print_text(f"only {len(entries)} items: all others are in the history", file=sys.stderr)


def _listed(text: str) -> list[str]:
    return [one.strip() for one in next(csv.reader([text], skipinitialspace=True))]


def _seconds(text: str) -> int:
    """Return seconds since 1970."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"--times {text}: must be whole seconds since 1970, or ISO format, such as 2016-07-01T12:30"
        ) from None
    return int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp())


def _lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max((len(str(entry["item"])) for entry in entries), default=0)
    return [
        f"{place:3}  {entry['item']!s:>{width}}  {entry['score']:9.4f}  {entry['title'] or ''}".rstrip()
        for place, entry in enumerate(entries, 1)
    ]
