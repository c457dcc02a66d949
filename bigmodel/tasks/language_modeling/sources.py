"""Documents of the input: find files, check each, and read them in pieces.

A file is a document. It must be UTF-8, and its SHA-256 identifies it. The result of this scan is cached by paths, sizes
and modification times, so a second start reads no text::

    <cache>/scans/<hash of (path, size, mtime in ns) of all files>.json    [[sha256, characters], ...] after its CRC-32
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bigmodel.data.cache import dumps, loads

READ_BYTES = 2**16  # larger blocks are not faster, and their strings fragment the memory

# Plain text, markup, source code.
_TEXT_SUFFIXES = (
    ".txt .text .md .rst .tex .org .html .htm .xml .css .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .cu .cuh .rs .go .java .kt"
    " .scala .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .swift .hs .ml .lisp .el .clj .ex .erl .cs .fs .sql .sh"
)
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
# Formats of records, never read as text; .json is read where a glob finds it, as a part of source code.
_TABLES = ".jsonl .ndjson .csv .tsv .parquet .arrow .feather .orc .avro .xls .xlsx .sqlite"
_TABLE_SUFFIXES = frozenset(_TABLES.split())


@dataclass(frozen=True)
class TextFile:
    """One file of the input.

    Attributes:
        path: path of the file.
        name: its path below the folder or glob that found it, which patterns are matched against.
        size: [bytes].
        sha256: of its bytes.
        characters: Unicode code points in it.
    """

    path: str
    name: str
    size: int
    sha256: str = ""
    characters: int = 0


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `stop` of a file: a document, or the part of a document in one split."""

    file: TextFile
    start: int
    stop: int

    @property
    def size(self) -> int:
        """[bytes]"""
        return self.stop - self.start

    @property
    def ends_document(self) -> bool:
        """True if end-of-text follows."""
        return self.stop == self.file.size


def matches(file: TextFile, patterns: Sequence[str]) -> bool:
    """True if a shell pattern (in which * also matches /) matches the file's name below its folder, or its full path."""
    path = os.path.abspath(file.path)
    for pattern in patterns:
        below = fnmatchcase(file.name, pattern) or fnmatchcase("/" + file.name, pattern)
        if below or (not pattern.startswith("*") and fnmatchcase(path, os.path.abspath(os.path.expanduser(pattern)))):
            return True
    return False


def find_files(paths: str | Sequence[str], exclude: Sequence[str] = ()) -> tuple[list[TextFile], list[str]]:
    """Return the input files in their order, without duplicates, and the empty files, which are excluded.

    The order is that of the paths; within a folder or glob, files are sorted.

    Args:
        paths: files, folders (recursively, files with one of `TEXT_SUFFIXES`) and globs (** is any depth). Hidden files
            in folders and globs are ignored. {stdlib} is the standard library's folder.
        exclude: patterns of files to exclude, see `matches`.

    Raises:
        ValueError: if a path does not exist or contains no file, all files are excluded, a file is a table, or a file that
            is given by its own path is empty.
    """
    found: dict[str, TextFile] = {}
    empty: list[str] = []
    for given in [paths] if isinstance(paths, str) else paths:
        path = os.path.expanduser(given.replace("{stdlib}", sysconfig.get_paths()["stdlib"]))
        if os.path.isfile(path):
            root, inside = os.path.dirname(path), [path]
            _check_suffix(path, _TABLE_SUFFIXES | {".json"})
            if os.path.getsize(path) == 0:
                raise ValueError(f"--data.path {path} is an empty file")
        elif os.path.isdir(path):
            root, inside = path, _in_folder(path, exclude)
        elif glob.has_magic(path):
            root = path[: min(path.find(sign) for sign in "*?[" if sign in path)].rpartition("/")[0]
            inside = _in_glob(path, root, exclude)
        else:
            raise ValueError(f"--data.path {given}: no such file or folder" + ("" if path == given else f" ({path})"))
        for one in inside:
            file = TextFile(one, os.path.relpath(one, root or "."), os.path.getsize(one))
            if one not in found and not matches(file, exclude):
                _check_suffix(one, _TABLE_SUFFIXES)
                found[one] = file
                if file.size == 0:
                    empty.append(one)
    files = [file for file in found.values() if file.size]
    if not files:
        why = f"all files are empty: {empty[:5]}" if empty else f"--data.exclude {list(exclude)} excludes all files"
        raise ValueError(f"--data.path {paths}: {why}")
    return files, empty


def _check_suffix(path: str, tables: frozenset[str]) -> None:
    """Check that a file is not a table, whose syntax and other columns would be trained on as text."""
    if (suffix := Path(path).suffix.lower()) in tables:
        raise ValueError(
            f"--data.path {path}: a {suffix} file holds records, and only text is accepted, one document per file: write its"
            " texts to files named *.txt, or exclude it by --data.exclude; if its characters themselves are the text, name"
            " a copy *.txt"
        )


def _walk(top: str, root: str, exclude: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield folders and the names of their files, without hidden folders and those excluded by a pattern ending in /**."""
    whole = [pattern[:-2] for pattern in exclude if pattern.endswith("/**")]

    def enter(path: str) -> bool:
        below = os.path.relpath(path, root or ".") + "/"
        excluded = any(fnmatchcase(below, pattern) or fnmatchcase("/" + below, pattern) for pattern in whole)
        return not excluded and not os.path.basename(path).startswith(".")

    for here, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if enter(os.path.join(here, name)))
        yield here, names


def _in_glob(pattern: str, root: str, exclude: Sequence[str]) -> list[str]:
    head, recursive, tail = pattern.partition("**/")
    if recursive:
        tops = glob.glob(head) if head else ["."]
        folders = [glob.escape(here) for top in tops for here, _ in _walk(os.path.normpath(top), root, exclude)]
        found = {path for here in folders for path in glob.glob(os.path.join(here, tail), recursive=True)}
    else:
        found = set(glob.glob(pattern, recursive=True))
    inside = sorted(path for path in found if os.path.isfile(path))
    if not inside:
        raise ValueError(f"--data.path {pattern}: no file matches" + (" outside of --data.exclude" if exclude else ""))
    return inside


def _in_folder(folder: str, exclude: Sequence[str]) -> list[str]:
    suffixes: Counter[str] = Counter()
    inside = []
    for here, names in _walk(folder, folder, exclude):
        for name in names:
            suffix = Path(name).suffix.lower()
            suffixes[suffix or "none"] += 1
            if suffix in TEXT_SUFFIXES and not name.startswith("."):
                inside.append(os.path.join(here, name))
    if not inside:
        present = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.most_common(5)) or "none"
        raise ValueError(
            f"--data.path {folder}: no file in this folder has a text suffix. Suffixes: {present}."
            f' If these are text, set --data.path to a pattern such as "{folder}/**/*.suffix"'
        )
    return sorted(path for path in inside if os.path.isfile(path))


def scan(files: Sequence[TextFile], cache: Path, progress: Callable[[int], None] = lambda _: None) -> list[TextFile]:
    """Return the files with their SHA-256 and number of characters, from the cache if no file has changed.

    Args:
        files: the files to read.
        cache: folder of the cache.
        progress: called with the number of bytes read since the last call.

    Raises:
        ValueError: if a file cannot be read or is not UTF-8; the message has the offset of the first invalid byte.
    """
    stats = [(os.path.abspath(f.path), f.size, os.stat(f.path).st_mtime_ns) for f in files]
    cached = cache / "scans" / (hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32] + ".json")
    try:
        scans = loads(cached.read_text())
    except (OSError, ValueError):
        scans = [_scan_file(file, progress) for file in files]
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_text(dumps(scans))
        partial.replace(cached)
    return [TextFile(f.path, f.name, f.size, *scan) for f, scan in zip(files, scans, strict=True)]


def _scan_file(file: TextFile, progress: Callable[[int], None]) -> tuple[str, int]:
    """Return SHA-256 and number of characters of a file."""
    digest, characters, offset, rest = hashlib.sha256(), 0, 0, b""
    try:
        with open(file.path, "rb") as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
                data = rest + block
                text, used = codecs.utf_8_decode(data, "strict", offset + len(data) >= file.size)
                characters += len(text)
                offset, rest = offset + used, data[used:]
                progress(len(block))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path} is not UTF-8: invalid byte 0x{error.object[error.start]:02x} at byte offset"
            f" {offset + error.start:,} ({error.reason}). Convert the file, or exclude it by --data.exclude"
        ) from None
    except OSError as error:
        raise ValueError(f"{file.path} cannot be read: {error.strerror}. Exclude it by --data.exclude") from error
    if offset != file.size:
        raise ValueError(f"{file.path} changed while it was read: from {file.size:,} to {offset:,} bytes")
    return digest.hexdigest(), characters


def read_text(segment: Segment, start: int | None = None, stop: int | None = None) -> str:
    """Return the text of a segment's bytes from `start` to `stop`, without characters truncated by these offsets."""
    start, stop = segment.start if start is None else start, segment.stop if stop is None else stop
    with open(segment.file.path, "rb") as stream:
        stream.seek(start)
        data = stream.read(stop - start)
    if len(data) < stop - start:
        raise ValueError(f"{segment.file.path} changed while it was read: it is now shorter than {stop:,} bytes")
    return data.decode("utf-8", "ignore")


def iter_text(segment: Segment, size: int = READ_BYTES) -> Iterator[str]:
    """Yield the text of a segment in pieces of about `size` bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(segment.file.path, "rb") as stream:
        stream.seek(segment.start)
        for position in range(segment.start, segment.stop, size):
            yield decoder.decode(stream.read(min(size, segment.stop - position)))
