"""Prepare texts once: check and tokenize them, read their labels, and write memory-mapped arrays.

They are read in one pass, a block at a time, so memory grows by only some 40 bytes per text. The assignment of texts to
splits, truncation and batching are done later, on the prepared texts. The key of a prepared folder is a hash of the
sources' contents, the columns, the problem type and the tokenizer; not of paths. Layout, all numbers little-endian::

    <cache>/transfer_learning/<key>/
        tokens.bin tokens.npy       int32, the texts concatenated; [N + 1] int64, where each begins
        texts.bin texts.npy         UTF-8, likewise; pairs.bin, pairs.npy: the second texts
        contents.npy                [N] int64, a hash of text and pair: equal ones are one content
        splits.npy                  [N] int8, numbers of `SPLITS`
        labels.npy offsets.npy      see `Labels`
        confidences.npy             [N] float32, where a column holds them
        meta.json
    <cache>/transfer_learning/scans/    hashes of files

This module imports neither torch nor Lightning.

N texts, M rows of a block.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bigmodel.data.cache import building, digest, disk_errors, progress, say, write_array, write_text
from bigmodel.data.checksums import compare_checksums, write_checksums
from bigmodel.data.split_shares import SPLIT_WORDS, split_name
from bigmodel.data.tables.rows import Rows, decode_dictionary, first_index, is_text
from bigmodel.tasks.transfer_learning.labels import LabelReader, Labels
from bigmodel.tasks.transfer_learning.problem_type import read_problem_type
from bigmodel.tasks.transfer_learning.sources import TextColumns, TextSource
from bigmodel.tasks.transfer_learning.sources.columns import SourcePart
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder

VERSION = 1
SPLITS = ("all", "train", "val", "test")  # `all`: the source has no splits
_CHARACTERS_AT_ONCE = 2**19  # tokenized together, which takes some 100 bytes of memory per token


class RaggedArray:
    """Arrays of different lengths, concatenated in a memory-mapped file. Pickled as its path.

    Args:
        folder: where it is.
        name: of its two files.
        dtype: of the values.

    Attributes:
        offsets: [N + 1] int64, where each begins.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._arguments = (folder, name, dtype)
        self.offsets: np.ndarray = np.load(folder / f"{name}.npy")
        path = folder / f"{name}.bin"
        size = int(self.offsets[-1]) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(f"{path} is damaged: its size is not {size:,} bytes. Delete {folder} and start again")
        self._values = np.memmap(path, dtype, "r") if size else np.empty(0, dtype)

    def __reduce__(self) -> tuple[type[RaggedArray], tuple[Path, str, str]]:
        return RaggedArray, self._arguments

    def __getitem__(self, i: int) -> np.ndarray:
        return self._values[self.offsets[i] : self.offsets[i + 1]]


class PreparedTexts:
    """Texts in their prepared folder.

    Args:
        folder: where they are.
        names: of the source's parts, for messages.

    Attributes:
        tokens: of each text, whole, with special tokens.
        texts: UTF-8.
        pairs: of the second texts; None if there are none.
        contents: [N] int64; equal where texts (and pairs) are.
        splits: [N] int8, numbers of `SPLITS`.
        labels: None if none were read.
        confidences: [N] float32, or None.
        fingerprint: hash of tokens, labels and splits.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder, self._names, self._parts = folder, names, meta["parts"]
        self.fingerprint: str = meta["fingerprint"]
        self.tokens = RaggedArray(folder, "tokens", "<i4")
        self.texts = RaggedArray(folder, "texts", "u1")
        self.pairs = RaggedArray(folder, "pairs", "u1") if (folder / "pairs.npy").exists() else None
        self.contents: np.ndarray = np.load(folder / "contents.npy")
        self.splits: np.ndarray = np.load(folder / "splits.npy")
        problem_type = meta["problem_type"] if "problem_type" in meta else meta["problem"]  # its earlier name
        self.labels = Labels(read_problem_type(problem_type), meta["names"], *_loaded(folder)) if problem_type else None
        there = (folder / "confidences.npy").exists()
        self.confidences: np.ndarray | None = np.load(folder / "confidences.npy") if there else None

    def __len__(self) -> int:
        return len(self.contents)

    def name(self, i: int) -> str:
        """Return the name of a text for messages: file and row."""
        return _row_name(self._parts, self._names, i)


def _row_name(parts: Sequence[tuple[int, int, str]], names: Sequence[str], i: int) -> str:
    """Return file and row of a text, from the first text of each part, its row offset, and the name of a row."""
    part = bisect_right([start for start, _, _ in parts], i) - 1
    start, first, word = parts[part]
    return f"{names[part]} {word} {first + i - start:,}"


def _loaded(folder: Path) -> Iterator[np.ndarray]:
    yield np.load(folder / "labels.npy")
    if (folder / "offsets.npy").exists():
        yield np.load(folder / "offsets.npy")


def prepare(
    source: TextSource, columns: TextColumns, problem_type: str, encoder: TextEncoder, cache: Path
) -> PreparedTexts:
    """Make the prepared folder of a source, unless it exists. Any number of processes may do so at the same time.

    Args:
        source: the source found at a path.
        columns: names of a table's columns.
        problem_type: type of the targets; or auto, see labels.py.
        encoder: the tokenizer.
        cache: folder of the task.

    Raises:
        ValueError: if a row is invalid, or there is none; the message names file and row, and the remedy.
        OSError: if the disk is full; the message names the required space and the place.
    """
    names = [part.where for part in source.parts]
    key = [VERSION, source.content, asdict(columns), columns.label and problem_type, encoder.fingerprint]
    folder = cache / digest(key)
    if not (folder / "meta.json").exists():
        _make(source, columns, problem_type, encoder, folder)
    compare_checksums(folder)
    return PreparedTexts(folder, names)


def _make(source: TextSource, columns: TextColumns, problem_type: str, encoder: TextEncoder, final: Path) -> None:
    began = time.monotonic()
    size = sum(part.size for part in source.parts)
    if source.left_out:
        say(
            f"{source.where}: {', '.join(source.left_out)} have no split in their names ({SPLIT_WORDS}) and are ignored"
        )
    with ExitStack() as stack:
        stack.enter_context(disk_errors(final.parent, lambda: 3 * size))
        folder = stack.enter_context(building(final))
        writer = stack.enter_context(_Writer(folder, columns, problem_type, encoder))
        advance = stack.enter_context(progress(f"tokenizing {source.where}", size))
        for part in source.parts:
            writer.start(part)
            for rows in part.rows():
                if len(rows):
                    writer.add(rows)
                advance(rows.size)
        write_text(folder / "meta.json", json.dumps({"version": VERSION, "source": source.where, **writer.finish()}))
        write_checksums(folder)
    speed = writer.num_texts / max(time.monotonic() - began, 1e-3)
    say(
        f"prepared {writer.num_texts:,} texts with {writer.num_tokens:,} tokens in {time.monotonic() - began:,.1f} s"
        f" ({speed:,.0f} texts/s) in {final}"
    )


class _Writer(ExitStack):
    """Writes blocks of rows to the files of a prepared folder."""

    def __init__(self, folder: Path, columns: TextColumns, problem_type: str, encoder: TextEncoder) -> None:
        super().__init__()
        self.folder, self.encoder, self.num_texts, self.num_tokens = folder, encoder, 0, 0
        self.content = sha256()
        self.lengths: dict[str, list[np.ndarray]] = {"tokens": [], "texts": []}
        if columns.pair is not None:
            self.lengths["pairs"] = []
        self.files = {name: self.enter_context((folder / f"{name}.bin").open("wb")) for name in self.lengths}
        self.contents: list[np.ndarray] = []
        self.splits: list[np.ndarray] = []
        self.confidences: list[np.ndarray] = []
        self.labels = LabelReader(problem_type, self.name) if columns.label is not None else None
        self.parts: list[tuple[int, int, str]] = []  # see `_row_name`
        self.names: list[str] = []
        self.split: str | None = None

    def start(self, part: SourcePart) -> None:
        self.split = part.split
        self.parts.append((self.num_texts, 0, "row"))
        self.names.append(part.where)

    def name(self, i: int) -> str:
        """Return file and row of a text."""
        return _row_name(self.parts, self.names, i)

    def add(self, rows: Rows) -> None:
        if self.parts[-1][0] == self.num_texts:
            self.parts[-1] = (self.num_texts, rows.first, rows.word)
        cells = [_texts(rows, role) for role in ("text", "pair") if role in rows.columns]
        if self.labels is not None:
            self.labels.add(rows)
        self.splits.append(self._splits_of(rows))
        if "confidence" in rows.columns:
            self.confidences.append(rows.columns["confidence"].to_numpy(zero_copy_only=False).astype(np.float32))
        for start, stop in _pieces(cells[0]):
            self._encode(rows, start, [some.slice(start, stop - start).to_pylist() for some in cells])
        self.num_texts += len(rows)

    def _encode(self, rows: Rows, start: int, texts: list[list[str]]) -> None:
        try:
            tokens = self.encoder.encode(*texts)
        except ValueError:
            for i, some in enumerate(zip(*texts, strict=True)):  # number of the text column
                try:
                    self.encoder.encode(*([text] for text in some))
                except ValueError as error:
                    raise ValueError(f"{rows.name(start + i)} cannot be tokenized: {error}") from error
            raise
        if empty := [i for i, row in enumerate(tokens) if len(row) == 0]:
            raise ValueError(
                f"{rows.name(start + empty[0])}: the tokenizer returns no token of this text: remove the row"
            )
        self._write("tokens", [row.astype("<i4") for row in tokens], 4)
        encoded = [[text.encode() for text in some] for some in texts]
        for name, bits in zip(("texts", "pairs"), encoded, strict=False):
            self._write(name, bits, 1)
        hashes = [
            blake2b(b"".join([len(row[0]).to_bytes(8, "little"), *row]), digest_size=8).digest()
            for row in zip(*encoded, strict=True)
        ]
        self.contents.append(np.frombuffer(b"".join(hashes), "<i8"))

    def _write(self, name: str, rows: Sequence[Any], itemsize: int) -> None:
        joined = b"".join(rows)
        self.files[name].write(joined)
        self.lengths[name].append(np.array([len(row) for row in rows], np.int64))
        if name == "tokens":
            self.content.update(joined)
            self.num_tokens += len(joined) // itemsize

    def _splits_of(self, rows: Rows) -> np.ndarray:
        """Return [M] int8, numbers of `SPLITS`."""
        if "split" not in rows.columns:
            return np.full(len(rows), SPLITS.index(self.split or "all"), np.int8)
        column = decode_dictionary(rows.columns["split"])
        words = pc.fill_null(column.cast(pa.string()), "").dictionary_encode()
        codes, meant = words.indices.to_numpy(), [split_name(word) for word in words.dictionary.to_pylist()]
        if None in meant:
            row = int(np.flatnonzero(codes == meant.index(None))[0])
            raise ValueError(
                f"{rows.name(row)}: {column[row].as_py()!r} in the column of splits is not a split ({SPLIT_WORDS}): correct"
                " it, or set --data.split_column null"
            )
        return np.array([SPLITS.index(str(name)) for name in meant], np.int8)[codes]

    def finish(self) -> dict[str, Any]:
        """Write the arrays in memory; return the contents of meta.json."""
        if not self.num_texts:
            raise ValueError("--data.path: the tables have no rows")
        labels = self.labels.labels() if self.labels is not None else None
        arrays = {"contents": np.concatenate(self.contents), "splits": np.concatenate(self.splits)}
        if labels is not None:
            arrays["labels"] = labels.values
        if labels is not None and labels.offsets is not None:
            arrays["offsets"] = labels.offsets
        if self.confidences:
            arrays["confidences"] = np.concatenate(self.confidences)
        for name, lengths in self.lengths.items():
            self.files[name].flush()
            os.fsync(self.files[name].fileno())
            arrays[name] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype("<i8")
        for name, array in arrays.items():
            self.content.update(np.ascontiguousarray(array).data)
            write_array(self.folder / f"{name}.npy", array)
        names = [] if labels is None else labels.names
        return {
            "problem_type": None if labels is None else labels.problem_type,
            "names": names,
            "parts": self.parts,
            "fingerprint": digest([self.content.hexdigest(), names]),
        }


def _texts(rows: Rows, role: str) -> pa.Array:
    """Return a column of texts, none of them empty."""
    values = decode_dictionary(rows.columns[role])
    if not is_text(values.type) and not pa.types.is_null(values.type):
        raise ValueError(
            f"{rows.where}: the column of {role}s is of type {values.type}, not text: set --data.{role}_column to another"
        )
    values = values.cast(pa.string())
    row = first_index(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
    if row >= 0:
        raise ValueError(f"{rows.name(row)}: the {role} is empty. Fill it, or remove the row")
    return values


def _pieces(texts: pa.Array) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows with about the number of characters that are tokenized at once."""
    ends = np.cumsum(pc.utf8_length(texts).to_numpy(zero_copy_only=False))
    start = 0
    while start < len(ends):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _CHARACTERS_AT_ONCE)))
        yield start, stop
        start = stop
