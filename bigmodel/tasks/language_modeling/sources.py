"""Documents of the input: find the files, check and measure each, read them in pieces.

A file is a document. Every byte is read once: it must be UTF-8, and its SHA-256 is its identity. The result is cached
by paths, sizes and modification times, so a second start reads no text::

    <cache>/scans/<hash of (path, size, mtime in ns) of all files>.json    [[sha256, characters], ...]
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

READ_BYTES = 2**16  # larger blocks are no faster, and their strings fragment the memory

# Plain text, markup, source code. Data files (json, csv) need a glob.
TEXT_SUFFIXES = {
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".htm", ".xml", ".css"),
    *(
        ".py",
        ".pyi",
        ".pyx",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".cxx",
        ".hpp",
        ".cu",
        ".cuh",
        ".rs",
        ".go",
        ".java",
        ".kt",
        ".scala",
    ),
    *(
        ".js",
        ".jsx",
        ".ts",
        ".tsx",
        ".rb",
        ".php",
        ".pl",
        ".lua",
        ".r",
        ".jl",
        ".swift",
        ".hs",
        ".ml",
        ".lisp",
        ".el",
        ".clj",
    ),
    *(".ex", ".erl", ".cs", ".fs", ".sql", ".sh"),
}


@dataclass(frozen=True)
class File:
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

    file: File
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


def matches(file: File, patterns: Sequence[str]) -> bool:
    """True if any shell pattern (in which * also matches /) matches the file's name below its folder, or its whole
    path.
    """
    path = os.path.abspath(file.path)
    for pattern in patterns:
        below = fnmatchcase(file.name, pattern) or fnmatchcase("/" + file.name, pattern)
        if below or (not pattern.startswith("*") and fnmatchcase(path, os.path.abspath(os.path.expanduser(pattern)))):
            return True
    return False


def find_files(paths: str | Sequence[str], exclude: Sequence[str] = ()) -> tuple[list[File], list[str]]:
    """Return the input files in their order, and the empty ones that were left out.

    The order is as given; sorted within a folder or glob; each file once.

    Args:
        paths: files, folders (in them, recursively, files with one of `TEXT_SUFFIXES`) and globs (all that match; ** is any
            depth). Hidden files are not found by a folder or a glob. {stdlib} is the standard library's folder.
        exclude: patterns of files to leave out, see `matches`.

    Raises:
        ValueError: if a path does not exist or holds no file, all files are excluded, or a file that was named itself
            is empty.
    """
    found: dict[str, File] = {}
    empty: list[str] = []
    for given in [paths] if isinstance(paths, str) else paths:
        path = os.path.expanduser(given.replace("{stdlib}", sysconfig.get_paths()["stdlib"]))
        if os.path.isfile(path):
            root, inside = os.path.dirname(path), [path]
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
            file = File(one, os.path.relpath(one, root or "."), os.path.getsize(one))
            if one not in found and not matches(file, exclude):
                found[one] = file
                if file.size == 0:
                    empty.append(one)
    files = [file for file in found.values() if file.size]
    if not files:
        why = f"all files found are empty: {empty[:5]}" if empty else f"--data.exclude {list(exclude)} leaves no file"
        raise ValueError(f"--data.path {paths}: {why}")
    return files, empty


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
        raise ValueError(
            f"--data.path {pattern}: no file matches" + (" that is not in --data.exclude" if exclude else "")
        )
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
        there = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes.most_common(5)) or "no files at all"
        raise ValueError(
            f"--data.path {folder}: no file in this folder has a suffix known as text; it has {there}."
            f' If these are text, give a pattern such as "{folder}/**/*.suffix"'
        )
    return sorted(path for path in inside if os.path.isfile(path))


def scan(files: Sequence[File], cache: Path, progress: Callable[[int], None] = lambda _: None) -> list[File]:
    """Return the files with their SHA-256 and number of characters, from the cache if none has changed.

    Args:
        files: the files to read.
        cache: folder of the cache.
        progress: called with the number of bytes read since the last call.

    Raises:
        ValueError: if a file cannot be read or is not UTF-8; names the file and the offset of the first bad byte.
    """
    stats = [(os.path.abspath(f.path), f.size, os.stat(f.path).st_mtime_ns) for f in files]
    memory = cache / "scans" / (hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32] + ".json")
    try:
        known = json.loads(memory.read_text())
    except (OSError, json.JSONDecodeError):
        known = [_read(file, progress) for file in files]
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known))
        partial.replace(memory)
    return [File(f.path, f.name, f.size, *facts) for f, facts in zip(files, known, strict=True)]


def _read(file: File, progress: Callable[[int], None]) -> tuple[str, int]:
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
            f"{file.path} is not UTF-8: bad byte 0x{error.object[error.start]:02x} at byte offset {offset + error.start:,}"
            f" ({error.reason}). Convert the file, or leave it out with --data.exclude"
        ) from None
    except OSError as error:
        raise ValueError(f"{file.path} cannot be read: {error.strerror}. Leave it out with --data.exclude") from error
    if offset != file.size:
        raise ValueError(f"{file.path} changed while it was read: {file.size:,} bytes at first, then {offset:,}")
    return digest.hexdigest(), characters


def read_text(segment: Segment, start: int | None = None, stop: int | None = None) -> str:
    """Return the text of a segment's bytes from `start` to `stop`, without a character that these offsets cut."""
    start, stop = segment.start if start is None else start, segment.stop if stop is None else stop
    with open(segment.file.path, "rb") as stream:
        stream.seek(start)
        data = stream.read(stop - start)
    if len(data) < stop - start:
        raise ValueError(f"{segment.file.path} changed while it was read: it is shorter than {stop:,} bytes now")
    return data.decode("utf-8", "ignore")


def blocks(segment: Segment, size: int = READ_BYTES) -> Iterator[str]:
    """Yield the text of a segment, in pieces of about `size` bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(segment.file.path, "rb") as stream:
        stream.seek(segment.start)
        for position in range(segment.start, segment.stop, size):
            yield decoder.decode(stream.read(min(size, segment.stop - position)))
