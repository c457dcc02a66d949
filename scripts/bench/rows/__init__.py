"""All there is to compare."""

from __future__ import annotations

from bench.rows.pictures import pictures
from bench.rows.recommendation import recommendation
from bench.rows.row import Row
from bench.rows.step import fixed_cost
from bench.rows.text import text
from bench.rows.transfer import transfer


def rows(quick: bool) -> list[Row]:
    """All rows. To add one, add it to its subject's."""
    return [
        *text(quick),
        *pictures(quick),
        transfer(*((14, 11, 100) if quick else (41, 11, 600))),
        fixed_cost(*((600, 200) if quick else (5000, 1000))),
        *recommendation(quick),
    ]
