"""`bigmodel recommend`: the best items for a user, or for somebody with a given history."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bigmodel.run.config import flag_value, parse_flags

_HELP = """\
bigmodel recommend RUN --user ID [--k 10] [--checkpoint best|last|FILE]
bigmodel recommend RUN --history ID,ID,... [--times TIME,TIME,...] [--k 10] [--checkpoint best|last|FILE]

Prints the items that a trained recommender puts first, the best on top, each with its score: for a user of the run's data,
or for somebody who has chosen these items, in this order, whom it need not have seen. What was chosen before is left out.

A net that reads times (HSTU) takes those of a history, one for each item: seconds since 1970, or dates in ISO format (UTC if
they do not say). Without them the items are taken to lie evenly apart, as far as is usual in the training data.
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
        print(_HELP, end="")
        return
    if len(positional) != 1 or ("user" in given) == ("history" in given):
        raise ValueError(
            "name one run, and either --user ID or --history ID,ID,...; `bigmodel recommend --help` says more"
        )
    if unknown := given.keys() - _FLAGS:
        raise ValueError(f"`bigmodel recommend` has no flag --{unknown.pop()}; it has --{', --'.join(sorted(_FLAGS))}")
    k = flag_value("k", given.get("k", "10"))
    if not isinstance(k, int):
        raise ValueError(f"--k {k}: the length of the list is a whole number")
    if "times" in given and "history" not in given:
        raise ValueError("--times belong to a --history; those of a user are in the data")
    times = [_seconds(one) for one in _listed(given["times"])] if "times" in given else None

    from bigmodel import run
    from bigmodel.protocols import SupportsRecommend

    runs_dir = given.get("runs_dir", "runs")
    task: Any = run.load(positional[0], given.get("checkpoint", "best"), runs_dir=runs_dir)
    if not isinstance(task, SupportsRecommend):
        raise ValueError(
            f"{positional[0]} is a {type(task).__name__}, which recommends nothing (bigmodel.protocols.SupportsRecommend)"
        )
    if "history" in given:
        entries = task.recommend(_listed(given["history"]), k, times)
    else:
        data: Any = run.load_data(positional[0], runs_dir=runs_dir)
        try:
            batch = data.user(given["user"], task.item_ids)
        except ValueError as error:
            raise ValueError(f"{error}; for somebody the data do not have: --history ID,ID,...") from error
        entries = task.recommend_to(batch, k)
    print("\n".join(_lines(entries)))
    if len(entries) < k:
        print(f"there are no more than {len(entries)}: all others were chosen before", file=sys.stderr)


def _listed(text: str) -> list[str]:
    return [one.strip() for one in text.split(",")]


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
            f"--times {text}: whole seconds since 1970 are accepted, or ISO format, such as 2016-07-01T12:30"
        ) from None
    return int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp())


def _lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max((len(str(entry["item"])) for entry in entries), default=0)
    return [
        f"{place:3}  {entry['item']!s:>{width}}  {entry['score']:9.4f}  {entry['title'] or ''}".rstrip()
        for place, entry in enumerate(entries, 1)
    ]
