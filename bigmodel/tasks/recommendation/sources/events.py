"""Conversion of blocks of rows to flat arrays of events: ids to numbers, times to one unit. Errors have the row.

N events, M rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigmodel.data.tables.rows import Rows, decode_dictionary, first_index, is_text

SPLITS = ("train", "val", "test")
_MISSING = pa.array(["", "nan", "NaN", "null", "NULL", "None"])  # texts for a missing id
_IDS = ": must be a whole number, at least 0, or text"
_UNITS = {"seconds": 10**6, "milliseconds": 10**3, "microseconds": 1}  # [microseconds]
_PER_UNIT = 10**11  # values of a unit are below this: as seconds the year 5138, as milliseconds 1973


@dataclass(frozen=True)
class RawInteractions:
    """Events in the order of the source.

    Attributes:
        users: [N] int32, rows of `user_ids`.
        items: [N] int32, rows of `item_ids`, from 0.
        ratings: [N] float32, or None.
        times: [N] int64, microseconds since 1970, or None.
        user_ids: ascending, int64 or string.
        item_ids: the same.
        titles: a table with `id`, `title`, `genres` (nulls where there are none), each item at most once; or None.
        line: readable summary.
        splits: [N] int8, 0 to 2 for train, val and test, of files named by split; or None.
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray | None
    times: np.ndarray | None
    user_ids: pa.Array
    item_ids: pa.Array
    titles: pa.Table | None
    line: str
    splits: np.ndarray | None = None


def collect(
    blocks: Iterable[Rows], advance: Callable[[int], None] = lambda _: None, splits: Mapping[str, str] | None = None
) -> RawInteractions:
    """Read all rows.

    Args:
        blocks: of rows.
        advance: called with the number of bytes read.
        splits: split of each file, if the files are named by split.

    Raises:
        ValueError: if a cell is invalid (with file and row), the files differ in their columns, or there are no rows.
    """
    reader = _Reader()
    numbers: list[np.ndarray] = []
    for rows in blocks:
        if len(rows):
            reader.add(rows)
            if splits is not None:
                numbers.append(np.full(len(rows), SPLITS.index(splits[rows.where]), np.int8))
        advance(rows.size)
    return replace(reader.events(), splits=np.concatenate(numbers) if numbers else None)


class _Reader:
    def __init__(self) -> None:
        self.blocks: list[tuple[int, Rows]] = []  # first event of a block, and the block without its columns
        self.num_events = 0
        self.roles: list[str] = []
        self.ids: dict[str, list[pa.DictionaryArray]] = {"user": [], "item": []}
        self.typed: dict[str, pa.DataType] = {}
        self.ratings: list[np.ndarray] = []
        self.times: list[np.ndarray] = []
        self.unit = ""
        self.titles: list[pa.Table] = []

    def add(self, rows: Rows) -> None:
        roles = sorted(rows.columns)
        if self.blocks and roles != self.roles:
            raise ValueError(f"{rows.where} has columns for {roles}, but {self.blocks[0][1].where} for {self.roles}")
        self.roles = roles
        for role in self.ids:
            self.ids[role].append(self._ids(rows, role))
        if "rating" in roles:
            self.ratings.append(_ratings(rows))
        if "time" in roles:
            self.times.append(self._times(rows))
        if "title" in roles or "genres" in roles:
            items = self.ids["item"][-1]
            some = pa.array(np.unique(items.indices.to_numpy(), return_index=True)[1])
            gap = pa.nulls(len(rows), pa.string())
            cells = [items.cast(items.type.value_type), *(rows.columns.get(role, gap) for role in ("title", "genres"))]
            self.titles.append(
                pa.table([cell.take(some).cast(pa.string()) for cell in cells], ["id", "title", "genres"])
            )
        self.blocks.append((self.num_events, replace(rows, columns={})))
        self.num_events += len(rows)

    def _ids(self, rows: Rows, role: str) -> pa.DictionaryArray:
        values = _trimmed(rows, rows.columns[role])
        whole, text = pa.types.is_integer(values.type), is_text(values.type)
        if not whole and not text:
            raise ValueError(
                f"{rows.where}: the column of {role}s is of type {values.type}; ids are whole numbers or text: set"
                f" --data.{role}_column to such a column, or cast it"
            )
        _check_no_missing(rows, values, f"{role} id")
        kind = pa.int64() if whole else pa.string()
        if rows.typed and self.typed.setdefault(role, kind) != kind:
            raise ValueError(
                f"{rows.where}: the column of {role}s is of type {kind}, but {self.typed[role]} in earlier files: cast one"
            )
        try:
            encoded = values.cast(kind).dictionary_encode()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{rows.where}: the column of {role}s does not fit into int64: {error}") from error
        bad = pc.less(encoded.dictionary, 0) if whole else pc.is_in(encoded.dictionary, _MISSING)
        if pc.any(bad).as_py():
            row = int(np.flatnonzero(np.asarray(bad)[encoded.indices.to_numpy()])[0])
            raise ValueError(f"{rows.name(row)}: invalid {role} id {values[row].as_py()!r}{_IDS}")
        return encoded

    def _times(self, rows: Rows) -> np.ndarray:
        """Return [M] microseconds since 1970."""
        values = _trimmed(rows, rows.columns["time"])
        _check_no_missing(rows, values, "time")
        if is_text(values.type):
            values = _parsed(rows, values)
        if (
            pa.types.is_temporal(values.type)
            and not pa.types.is_time(values.type)
            and not pa.types.is_duration(values.type)
        ):
            self._same_unit(rows, 0, "dates", values[0])
            kind = pa.timestamp("us", values.type.tz if pa.types.is_timestamp(values.type) else None)
            instants: np.ndarray = values.cast(kind, safe=False).cast(pa.int64()).to_numpy()
            return instants
        if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
            raise ValueError(
                f"{rows.where}: the column of times is of type {values.type}; must be seconds or milliseconds since 1970,"
                " text in ISO format, or timestamps: set --data.time_column to such a column"
            )
        numbers = values.to_numpy(zero_copy_only=False)
        bad = ~(np.isfinite(numbers) & (numbers >= 0))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ValueError(f"{rows.name(row)}: invalid time {numbers[row]!s}: must be 0 or above, since 1970")
        if pa.types.is_integer(values.type) and (dates := _dates(numbers)) is not None:
            self._same_unit(rows, 0, "dates", numbers[0])
            return dates
        if pa.types.is_floating(values.type) and (numbers % 1 == 0).all() and numbers.max() < 2**63:
            numbers = numbers.astype(np.int64)
        for row in (int(numbers.argmin()), int(numbers.argmax())):
            self._same_unit(rows, row, _unit(float(numbers[row])), numbers[row])
        if self.unit == "nanoseconds":
            return (numbers // 1000).astype(np.int64)
        return (numbers * _UNITS[self.unit]).astype(np.int64)

    def _same_unit(self, rows: Rows, row: int, unit: str, value: Any) -> None:
        self.unit = self.unit or unit
        if unit != self.unit:
            raise ValueError(
                f"{rows.name(row)}: the time {value!s} is in {unit}, by its size, but others are in {self.unit}: convert all"
                " times to one unit"
            )

    def events(self) -> RawInteractions:
        if not self.num_events:
            raise ValueError("--data.path: the tables have no rows")
        users, user_ids = self._numbered("user")
        items, item_ids = self._numbered("item")
        what = [name for name, there in (("ratings", self.ratings), (f"times ({self.unit})", self.times)) if there]
        line = f"read {self.num_events:,} events of {len(user_ids):,} users with {len(item_ids):,} items"
        line += f", with {' and '.join(what)}" if what else ""
        line += "" if self.times else "; without times, in the order of the source"
        return RawInteractions(
            users,
            items,
            np.concatenate(self.ratings) if self.ratings else None,
            np.concatenate(self.times) if self.times else None,
            user_ids,
            item_ids,
            pa.concat_tables(self.titles) if self.titles else None,
            line,
        )

    def _numbered(self, role: str) -> tuple[np.ndarray, pa.Array]:
        """Return the position [N] int32 of each event's id among the ascending ids, and the ids."""
        chunks = self.ids[role]
        if len({chunk.type for chunk in chunks}) > 1:  # integers in one file, text in another that may contain integers
            chunks = [pa.DictionaryArray.from_arrays(c.indices, c.dictionary.cast(pa.string())) for c in chunks]
        whole = pa.chunked_array(chunks).unify_dictionaries().combine_chunks()
        chunks.clear()
        codes, ids = whole.indices.to_numpy(), whole.dictionary
        if is_text(ids.type) and self.typed.get(role) != pa.string():
            ids = self._as_integers(role, codes, ids)
        order = pc.array_sort_indices(ids).to_numpy()
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        return place[codes], ids.take(pa.array(order))

    def _as_integers(self, role: str, codes: np.ndarray, ids: pa.Array) -> pa.Array:
        """Return the ids as integers if all of them are plain integers (no leading zeros)."""
        try:
            numbers = ids.cast(pa.int64())
        except pa.ArrowInvalid:
            return ids
        if not numbers.cast(pa.string()).equals(ids):
            return ids
        if pc.any(bad := pc.less(numbers, 0)).as_py():
            event = int(np.flatnonzero(np.asarray(bad)[codes])[0])
            raise ValueError(f"{self._name(event)}: invalid {role} id {numbers[int(codes[event])].as_py()}{_IDS}")
        return numbers

    def _name(self, event: int) -> str:
        """Return file and row of an event."""
        first, rows = next(block for block in reversed(self.blocks) if block[0] <= event)
        return rows.name(event - first)


def _unit(number: float) -> str:
    """Return the unit of a time of this size since 1970."""
    power = 0
    while number >= _PER_UNIT * 1000**power:
        power += 1
    return [*_UNITS, "nanoseconds"][min(power, 3)]


def _dates(numbers: np.ndarray) -> np.ndarray | None:
    """Return [M] microseconds since 1970 of dates such as 20240131; None if a number is no such date."""
    if numbers.min() < 19700101 or numbers.max() > 21001231:
        return None
    different, which = np.unique(numbers, return_inverse=True)
    try:
        days = np.array([date(n // 10_000, n // 100 % 100, n % 100) for n in different.tolist()], "datetime64[us]")
    except ValueError:
        return None
    return days.astype(np.int64)[which]


def _trimmed(rows: Rows, values: pa.Array) -> pa.Array:
    """Return a column without dictionary encoding; in a text table, cells without spaces around them."""
    values = decode_dictionary(values)
    return values if rows.typed else pc.utf8_trim_whitespace(values)


def _check_no_missing(rows: Rows, values: pa.Array, what: str) -> None:
    missing = pc.is_null(values)
    if what == "time" and is_text(values.type):
        missing = pc.or_kleene(missing, pc.is_in(values, _MISSING))
    if pc.any(missing).as_py():
        raise ValueError(f"{rows.name(first_index(missing))}: the {what} is missing")


def _ratings(rows: Rows) -> np.ndarray:
    """Return ratings [M] float32."""
    values = rows.columns["rating"]
    _check_no_missing(rows, values, "rating")
    if is_text(values.type):
        values = _cast(rows, values, pa.float64(), "rating")
    try:
        ratings: np.ndarray = values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{rows.where}: the column of ratings is of type {values.type}; must be numbers: set --data.rating_column"
        ) from error
    if not np.isfinite(ratings).all():
        row = int(np.flatnonzero(~np.isfinite(ratings))[0])
        raise ValueError(f"{rows.name(row)}: invalid rating {ratings[row]!s}")
    return ratings


def _parsed(rows: Rows, values: pa.Array) -> pa.Array:
    """Parse times in text as numbers or timestamps; the first row determines which."""
    first = values[0].as_py().strip()
    try:
        float(first)
    except ValueError:
        zone = first.endswith("Z") or "+" in first or first[10:].count("-") > 0
        unit = "ns" if len(first.partition(".")[2].rstrip("Z")) > 6 else "us"
        return _cast(rows, values, pa.timestamp(unit, "UTC" if zone else None), "time")
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        return _cast(rows, values, pa.float64(), "time")


def _cast(rows: Rows, values: pa.Array, kind: pa.DataType, what: str) -> pa.Array:
    """Convert text to numbers or timestamps; an error names the first invalid row."""
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        values = pc.utf8_trim_whitespace(values)
    try:
        return values.cast(kind)
    except pa.ArrowInvalid as error:
        low, high = 0, len(values)  # bisection, until one row is left
        while high - low > 1:
            middle = (low + high) // 2
            try:
                values.slice(low, middle - low).cast(kind)
                low = middle
            except pa.ArrowInvalid:
                high = middle
        form = "a number"
        if pa.types.is_timestamp(kind):
            form = f"in ISO format, {'with' if kind.tz else 'without'} a zone like the others"
        raise ValueError(f"{rows.name(low)}: the {what} {values[low].as_py()!r} is not {form}") from error
