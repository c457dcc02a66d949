"""Prepare events once: read, filter, sort and number them, and write memory-mapped arrays.

The key of a prepared folder is a hash of the sources' contents, the columns and the filters; not of paths. Layout::

    <cache>/recommendation/<key>/
        offsets.npy items.npy times.npy ratings.npy     `Interactions`; times and ratings if the source has them,
        splits.npy                                      and splits if its files are named by split
        users.parquet items.parquet                     ids in the source, `IdTable`
        meta.json
    <cache>/recommendation/scans/                       hashes of files

This module imports neither torch nor Lightning.

N events, U users, I items.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigmodel.data.cache import building, digest, disk_errors, progress, say, write_array, write_text
from bigmodel.data.checksums import compare_checksums, write_checksums
from bigmodel.tasks.recommendation.filters import Filters
from bigmodel.tasks.recommendation.interactions import IdTable, Interactions
from bigmodel.tasks.recommendation.sources import InteractionColumns, InteractionSource
from bigmodel.tasks.recommendation.sources.events import RawInteractions, collect

VERSION = 2
_BYTES_PER_EVENT = 16


@dataclass(frozen=True)
class PreparedInteractions:
    """Events in their prepared folder.

    Attributes:
        folder: the prepared folder.
        events: all of them.
        users: ids of users.
        items: ids of items.
        lines: readable summary of the events read and excluded.
        fingerprint: hash of events and ids.
    """

    folder: Path
    events: Interactions
    users: IdTable
    items: IdTable
    lines: list[str]
    fingerprint: str

    @classmethod
    def load(cls, folder: Path) -> PreparedInteractions:
        """Load a folder written by `prepare`; arrays are memory-mapped."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {
            name: np.load(path, mmap_mode="r") if (path := folder / f"{name}.npy").exists() else None
            for name in ("offsets", "items", "times", "ratings", "splits")
        }
        assert arrays["offsets"] is not None
        assert arrays["items"] is not None
        items = IdTable(pq.read_table(folder / "items.parquet"), 1, "item")
        return cls(
            folder,
            Interactions(
                np.asarray(arrays["offsets"]),
                arrays["items"],
                arrays["times"],
                arrays["ratings"],
                len(items),
                arrays["splits"],
            ),
            IdTable(pq.read_table(folder / "users.parquet"), 0, "user"),
            items,
            meta["lines"],
            meta["fingerprint"],
        )


def prepare(
    source: InteractionSource, columns: InteractionColumns, filters: Filters, cache: Path
) -> PreparedInteractions:
    """Create the prepared folder of a source, unless it exists. Any number of processes may call this at the same time.

    Raises:
        ValueError: if the source is invalid, or fewer than two items remain after the filters.
        OSError: if the disk is full; the message names the required space and the place.
    """
    folder = cache / digest([VERSION, source.content, asdict(columns), filters.settings()])
    if not (folder / "meta.json").exists():
        _write(source, filters, folder)
    compare_checksums(folder)
    return PreparedInteractions.load(folder)


def _write(source: InteractionSource, filters: Filters, final: Path) -> None:
    start = time.monotonic()
    with progress(f"reading {source.where}", source.size) as advance:
        raw = collect(source.rows(), advance, source.splits)
    titles = raw.titles if raw.titles is not None else source.titles()
    events, users, items, lines = _sort(raw, filters)
    with ExitStack() as stack:
        stack.enter_context(disk_errors(final.parent, lambda: _BYTES_PER_EVENT * len(events)))
        folder = stack.enter_context(building(final))
        content = hashlib.sha256()
        for name in ("offsets", "items", "times", "ratings", "splits"):
            array = getattr(events, name)
            if array is not None:
                content.update(np.ascontiguousarray(array).data)
                write_array(folder / f"{name}.npy", array)
        for name, ids, ids_titles in (("users", users, None), ("items", items, titles)):
            for buffer in ids.buffers():
                content.update(b"" if buffer is None else buffer)
            pq.write_table(_id_table(ids, ids_titles), folder / f"{name}.parquet")
        meta = {"version": VERSION, "source": source.where, "lines": lines, "fingerprint": content.hexdigest()[:32]}
        write_text(folder / "meta.json", json.dumps(meta, indent=2))
        write_checksums(folder)
    for line in lines:
        say(line)
    say(f"prepared events in {time.monotonic() - start:,.1f} s in {final}")


def _sort(raw: RawInteractions, filters: Filters) -> tuple[Interactions, pa.Array, pa.Array, list[str]]:
    """Return events sorted by user and time, and filtered; ids of the remaining users and items; a summary in lines."""
    # The sort is stable: events of equal time stay in the order of the source.
    keys = (raw.users,) if raw.times is None else (raw.times, raw.users)
    order = np.lexsort(keys)
    users, items = raw.users[order], raw.items[order]
    ratings = None if raw.ratings is None else raw.ratings[order]
    kept, lines = filters.apply(users, items, ratings)
    if len(kept) < len(order):
        order, users, items = order[kept], users[kept], items[kept]
        ratings = None if ratings is None else ratings[kept]
    user_rows, counts = np.unique(users, return_counts=True)
    present = np.zeros(len(raw.item_ids), bool)
    present[items] = True
    number = np.cumsum(present, dtype=np.int32)  # from 1, in the order of the ids
    num_items = int(number[-1])
    if num_items < 2:
        excluded = f" ({'; '.join(lines)})" if lines else ""
        raise ValueError(f"--data.path: there is only {num_items} item{excluded}; at least 2 are needed")
    events = Interactions(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        number[items],
        None if raw.times is None else raw.times[order] // 10**6,
        ratings,
        num_items,
        None if raw.splits is None else raw.splits[order],
    )
    lines = [raw.line, *lines]
    if len(lines) > 1:
        lines.append(f"remaining: {len(events):,} events of {events.num_users:,} users with {num_items:,} items")
    return events, raw.user_ids.take(pa.array(user_rows)), raw.item_ids.filter(pa.array(present)), lines


def _id_table(ids: pa.Array, titles: pa.Table | None) -> pa.Table:
    """Return the table of an `IdTable`, with titles and genres if there are any."""
    if titles is None:
        return pa.table({"id": ids})
    rows = {item: row for row, item in reversed(list(enumerate(titles.column("id").to_pylist())))}  # the first of each
    which = pa.array([rows.get(item) for item in ids.cast(pa.string()).to_pylist()], pa.int64())
    return pa.table({"id": ids} | {name: titles.column(name).take(which) for name in ("title", "genres")})
