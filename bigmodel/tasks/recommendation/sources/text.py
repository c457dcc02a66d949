"""Layouts of events in text: tables with a header, RecBole's .inter, MovieLens without header. Each line is an event."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import replace

from bigmodel.data.tables.text import Layout, first_line, layout_of

_MOVIELENS = ["user_id", "item_id", "rating", "timestamp"]


def events_layout(path: str, column_names: list[str] | None = None, known: Set[str] = frozenset()) -> Layout:
    """Return the layout of a file of events.

    Args:
        path: the file.
        column_names: of a file without a header line; None: it has one, unless it is of MovieLens.
        known: names of columns, of which a header line has some.

    Raises:
        ValueError: if it cannot be read, its first line is an event, or has another number of columns.
    """
    line = first_line(path)
    given, path = path, path.removesuffix(".gz")
    if os.path.basename(path) == "u.data":  # MovieLens 100K
        return Layout("\t", _MOVIELENS, header=False, lines=True)
    if "::" in line:  # MovieLens 1M and 10M: with a single colon, each second column is empty
        cells = [cell.strip() for cell in line.split("::")]
        header = column_names is None and not known.isdisjoint(cells)
        names = cells if header else column_names or _MOVIELENS[: len(cells)]
        _check_number(path, names, cells)
        between = [name for i, one in enumerate(names) for name in (one, f"-{i}")][:-1]
        return Layout(":", between, header=header, quotes=False, lines=True)
    if path.endswith(".inter"):  # RecBole: user_id:token, rating:float, ...; neither quotes nor escapes
        cells = line.rstrip("\r\n").split("\t")
        for cell in cells:
            name, _, kind = cell.partition(":")
            if kind.endswith("_seq") and name.endswith("_list"):
                raise ValueError(
                    f"{path}: the column {name!r} is a list ({kind}), a user's history in each line; must be one event in"
                    " each line: set --data.path to the atomic file from which it was made"
                )
        layout = Layout("\t", [cell.split(":")[0] for cell in cells], quotes=False, lines=True)
    else:
        layout = layout_of(given, lines=True)
    if column_names is not None:
        _check_number(path, column_names, layout.names)
        return replace(layout, names=column_names, header=False)
    if all(_is_number(name) for name in layout.names):
        usual = ",".join(_MOVIELENS[: len(layout.names)])
        raise ValueError(
            f"{path}: the first line, {line.strip()[:60]!r}, has no column names; if the table has no header line, set"
            f" --data.column_names to the name of each column, such as [{usual}]"
        )
    return layout


def _check_number(path: str, names: list[str], cells: list[str]) -> None:
    if len(names) != len(cells):
        raise ValueError(
            f"{path}: the first line has {len(cells)} columns, but there are {len(names)} names {names}: set"
            " --data.column_names to one for each column"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
