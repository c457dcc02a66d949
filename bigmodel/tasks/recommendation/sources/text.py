"""Layouts of events in text: tables with a header, RecBole's .inter, MovieLens without header. Each line is an event."""

from __future__ import annotations

import os

from bigmodel.data.tables.text import Layout, first_line, layout_of

_MOVIELENS = ["user_id", "item_id", "rating", "timestamp"]


def events_layout(path: str) -> Layout:
    """Return the layout of a file of events.

    Raises:
        ValueError: if it cannot be read.
    """
    line = first_line(path)
    if os.path.basename(path) == "u.data":  # MovieLens 100K
        return Layout("\t", _MOVIELENS, header=False, lines=True)
    if "::" in line:  # MovieLens 1M and 10M: with a single colon, each second column is empty
        names = [name for pair in zip(_MOVIELENS, ("-1", "-2", "-3", ""), strict=True) for name in pair][:-1]
        return Layout(":", names, header=False, quotes=False, lines=True)
    if path.endswith(".inter"):  # RecBole: user_id:token, rating:float, ...; neither quotes nor escapes
        names = [name.split(":")[0] for name in line.rstrip("\r\n").split("\t")]
        return Layout("\t", names, quotes=False, lines=True)
    return layout_of(path, lines=True)
