"""`bigmodel recommend`: the best items for a user, or for somebody with a given history."""

from __future__ import annotations

import sys
from typing import Any

from bigmodel.cli.settings import flag_value, parse_flags

_HELP = """\
bigmodel recommend RUN --user ID [--k 10] [--checkpoint best|last|FILE]
bigmodel recommend RUN --history ID,ID,... [--k 10] [--checkpoint best|last|FILE]

Prints the items that a trained recommender puts first, the best on top, each with its score: for a user of the run's data,
or for somebody who has chosen these items, in this order, whom it need not have seen. What was chosen before is left out.
"""
_FLAGS = {"user", "history", "k", "checkpoint", "runs_dir"}


def run_recommend(argv: list[str]) -> None:
    """Load a run's task and print its list.

    Raises:
        ValueError: for arguments that do not fit together, a run that recommends nothing, an unknown user or item.
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

    from bigmodel import run

    runs_dir = given.get("runs_dir", "runs")
    task: Any = run.load(positional[0], given.get("checkpoint", "best"), runs_dir=runs_dir)
    if not hasattr(task, "recommend"):
        raise ValueError(f"{positional[0]} is a {type(task).__name__}, which has no method `recommend`")
    if "history" in given:
        history = given["history"]
        if isinstance(history, str):
            history = [one.strip() for one in history.split(",")]
        entries = task.recommend(history if isinstance(history, list) else [history], k)
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


def _lines(entries: list[dict[str, Any]]) -> list[str]:
    width = max((len(str(entry["item"])) for entry in entries), default=0)
    return [
        f"{place:3}  {entry['item']!s:>{width}}  {entry['score']:9.4f}  {entry['title'] or ''}".rstrip()
        for place, entry in enumerate(entries, 1)
    ]
