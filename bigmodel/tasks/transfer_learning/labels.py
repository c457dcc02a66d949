"""Conversion of a label column to class indices, multi-hot labels or regression targets; the type can be inferred.

`auto`: a column of floats (of a CSV: all cells are numbers, and not all whole) is for regression, of lists (of a CSV: all
cells are JSON lists) multi-label, any other single-label. Classes are sorted by name, or by value if all are whole numbers.

N texts, M rows in a block, L labels of all texts together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigmodel.data.tables.rows import Rows, decode_dictionary, first_index, is_text
from bigmodel.tasks.transfer_learning.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ProblemType

_SEPARATORS = re.compile(r"[|;]")
_WHOLE = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Labels:
    """The labels of all texts.

    Attributes:
        problem_type: type of the targets.
        names: of the classes that occur, or are declared; [] for regression.
        values: [N] int32 rows of `names`, -1 where a declared class is not given; [L] int32 if multi-label; [N] float32
            for regression.
        offsets: [N + 1] int64, where each text's labels begin in `values`; None if it has one value.
    """

    problem_type: ProblemType
    names: list[str]
    values: np.ndarray
    offsets: np.ndarray | None = None

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated values of these texts [n], and the number of values of each [n] int64."""
        if self.offsets is None:
            return self.values[rows], np.ones(len(rows), np.int64)
        counts = self.offsets[rows + 1] - self.offsets[rows]
        shifts = self.offsets[rows] - (np.cumsum(counts) - counts)
        return self.values[np.repeat(shifts, counts) + np.arange(counts.sum())], counts


class LabelReader:
    """Collects the labels of blocks of rows.

    Args:
        problem_type: type of the targets; `auto`: see above.
        name: returns the name of a row for messages, by its number in all blocks.
    """

    def __init__(self, problem_type: str, name: Callable[[int], str]) -> None:
        self.problem_type, self.name = problem_type, name
        self._kind = ""
        self._typed = True
        self._classes: list[str] | None = None
        self._cells: list[Any] = []  # of each block, by kind: text and list encoded as dictionary, others as they are
        self._counts: list[np.ndarray] = []  # of each row's list
        self._where = ""

    def add(self, rows: Rows) -> None:
        """Add the labels of a block.

        Raises:
            ValueError: if a cell is empty, or the type of the column is invalid or differs from previous blocks.
        """
        values = decode_dictionary(rows.columns["label"])
        if not rows.typed:
            values = pc.utf8_trim_whitespace(values)
        _refuse_gaps(rows, values)
        kind = _kind(values.type)
        if kind is None:
            raise ValueError(
                f"{rows.where}: the column of labels is of type {values.type}; text, whole numbers, floats and lists are"
                " accepted: set --data.label_column to such a column"
            )
        if {kind, self._kind} == {"whole", "float"}:
            self._kind = kind = "float"
        classes = rows.classes.get("label")
        if kind != (self._kind or kind) or classes != (self._classes if self._where else classes):
            raise ValueError(
                f"{rows.where}: the type of the labels ({kind}) or their classes differ from {self._where} ({self._kind}):"
                " convert them to one type"
            )
        self._kind, self._where, self._classes = kind, rows.where, classes
        self._typed = rows.typed
        if kind == "list":
            counts = pc.list_value_length(values).to_numpy(zero_copy_only=False)
            self._counts.append(counts)
            values = decode_dictionary(values.flatten())
            if (place := first_index(pc.is_null(values))) >= 0:
                row = int(np.searchsorted(np.cumsum(counts), place, side="right"))
                raise ValueError(f"{rows.name(row)}: one of the labels is null: remove it from the list")
            if classes is not None:
                values = pa.array(classes).take(values)
            values = values.cast(pa.string())
        self._cells.append(values.dictionary_encode() if kind in ("text", "list") else values)

    def labels(self) -> Labels:
        """Return the labels of all rows.

        Raises:
            ValueError: if they do not match the problem type, or a number is invalid; names the row.
        """
        read = {"text": self._of_text, "whole": self._of_whole, "float": self._of_floats, "list": self._of_lists}
        return read[self._kind]()

    def _of_text(self) -> Labels:
        codes, cells = self._unified()
        problem_type = self.problem_type
        if problem_type == "auto":
            problem_type = SINGLE_LABEL if self._typed else _infer_problem_type(cells)
        if problem_type == SINGLE_LABEL:
            return _numbered(SINGLE_LABEL, codes, cells)
        if problem_type == REGRESSION:
            return self._numbers(np.array([_number(cell) for cell in cells], np.float64)[codes], codes, cells)
        lists = [_listed(cell) for cell in cells]
        if None in lists:
            row = int(np.flatnonzero(codes == lists.index(None))[0])
            raise ValueError(
                f'{self.name(row)}: {cells[codes[row]][:60]!r} is not a list of labels; accepted are JSON (["a", "b"]) and'
                " text separated by | or ;"
            )
        names = list(dict.fromkeys(name for some in lists for name in some or ()))
        number = {name: i for i, name in enumerate(names)}
        each = [np.array([number[name] for name in some or ()], np.int32) for some in lists]
        counts = np.array([len(some) for some in each])[codes]
        return _numbered(MULTI_LABEL, np.concatenate([each[code] for code in codes.tolist()]), names, counts)

    def _of_whole(self) -> Labels:
        values = np.concatenate([cells.cast(pa.int64()).to_numpy(zero_copy_only=False) for cells in self._cells])
        if self.problem_type == REGRESSION:
            return self._numbers(values.astype(np.float64))
        problem_type: ProblemType = MULTI_LABEL if self.problem_type == MULTI_LABEL else SINGLE_LABEL
        if self._classes is not None:
            if (bad := (values < -1) | (values >= len(self._classes))).any():
                row = int(np.argmax(bad))
                raise ValueError(
                    f"{self.name(row)}: class {values[row]} is outside of the {len(self._classes)} declared classes"
                )
            return _with_offsets(Labels(problem_type, self._classes, values.astype(np.int32)))
        distinct, codes = np.unique(values, return_inverse=True)
        words = pa.array(distinct).cast(pa.bool_() if pa.types.is_boolean(self._cells[0].type) else pa.int64())
        return _with_offsets(_numbered(problem_type, codes, words.cast(pa.string()).to_pylist()))

    def _of_floats(self) -> Labels:
        values = np.concatenate([cells.cast(pa.float64()).to_numpy(zero_copy_only=False) for cells in self._cells])
        if self.problem_type in ("auto", REGRESSION):
            return self._numbers(values)
        if self.problem_type == MULTI_LABEL or (bad := ~(values % 1 == 0)).any():
            row = 0 if self.problem_type == MULTI_LABEL else int(np.argmax(bad))
            raise ValueError(f"{self.name(row)}: {values[row]} is not a class: set --data.problem_type {REGRESSION}")
        distinct, codes = np.unique(values.astype(np.int64), return_inverse=True)
        return _numbered(SINGLE_LABEL, codes, [str(value) for value in distinct.tolist()])

    def _of_lists(self) -> Labels:
        if self.problem_type not in ("auto", MULTI_LABEL):
            raise ValueError(
                f"--data.problem_type {self.problem_type}: the column of labels in {self._where} holds lists: set"
                f" --data.problem_type {MULTI_LABEL}"
            )
        codes, names = self._unified()
        return _numbered(MULTI_LABEL, codes, names, np.concatenate(self._counts))

    def _unified(self) -> tuple[np.ndarray, list[str]]:
        """Return the code of each cell among the distinct cells, and these."""
        whole = pa.chunked_array(self._cells).unify_dictionaries().combine_chunks()
        self._cells.clear()
        return whole.indices.to_numpy(), whole.dictionary.to_pylist()

    def _numbers(self, values: np.ndarray, codes: np.ndarray | None = None, cells: list[str] | None = None) -> Labels:
        with np.errstate(over="ignore"):
            numbers = values.astype(np.float32)
        if (bad := ~np.isfinite(numbers)).any():
            row = int(np.argmax(bad))
            cell = str(values[row]) if codes is None or cells is None else cells[codes[row]][:60]
            raise ValueError(
                f"{self.name(row)}: the label {cell!r} is not a finite number: correct it or remove the row"
                f" ({bad.sum():,} in all)"
            )
        return Labels(REGRESSION, [], numbers)


def _kind(kind: pa.DataType) -> str | None:
    if is_text(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "whole"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        # An empty list has no type.
        fits = is_text(inner) or pa.types.is_integer(inner) or pa.types.is_dictionary(inner) or pa.types.is_null(inner)
        return "list" if fits else None
    return "text" if pa.types.is_null(kind) else None


def _refuse_gaps(rows: Rows, values: pa.Array) -> None:
    row = first_index(pc.is_null(values))
    if row < 0 and is_text(values.type):
        row = first_index(pc.equal(values, ""))
    if row >= 0:
        raise ValueError(
            f"{rows.name(row)}: there is no label. Add one, or remove the row; for --data.problem_type {MULTI_LABEL} an"
            " empty list, [], is accepted"
        )


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _infer_problem_type(cells: list[str]) -> ProblemType:
    """Return the problem type of the distinct cells of a text table."""
    try:
        if [float(cell) for cell in cells] and not all(_WHOLE.fullmatch(cell) for cell in cells):
            return REGRESSION
    except ValueError:
        pass
    if all(cell.startswith("[") and _listed(cell) is not None for cell in cells):
        return MULTI_LABEL
    return SINGLE_LABEL


def _listed(cell: str) -> list[str] | None:
    """Return the labels in a cell; None if it is not a list."""
    if not cell.startswith("["):
        return list(dict.fromkeys(part.strip() for part in _SEPARATORS.split(cell) if part.strip()))
    try:
        found = json.loads(cell)
    except json.JSONDecodeError:
        return None
    if not all(isinstance(label, str | int) for label in found):
        return None
    return list(dict.fromkeys(str(label) for label in found))


def _numbered(
    problem_type: ProblemType, codes: np.ndarray, names: list[str], counts: np.ndarray | None = None
) -> Labels:
    """Return labels with sorted classes, from codes of unsorted `names`."""
    as_numbers = all(_WHOLE.fullmatch(name) for name in names)
    order = sorted(range(len(names)), key=lambda i: (int(names[i]), names[i]) if as_numbers else names[i])
    place = np.empty(len(names), np.int32)
    place[order] = np.arange(len(names), dtype=np.int32)
    values = place[codes] if len(codes) else np.empty(0, np.int32)
    offsets = None if counts is None else np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Labels(problem_type, [names[i] for i in order], values, offsets)


def _with_offsets(labels: Labels) -> Labels:
    """Return the labels with offsets: if multi-label, each text then has one."""
    if labels.problem_type == SINGLE_LABEL:
        return labels
    return Labels(labels.problem_type, labels.names, labels.values, np.arange(len(labels.values) + 1, dtype=np.int64))
