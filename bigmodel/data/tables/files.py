"""File lookup by paths, folders and globs, and detection of the kind of table."""

from __future__ import annotations

import glob
import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Literal, cast


def find_files(path: str | Sequence[str], in_folder: Callable[[str], list[str]], known: str) -> list[str]:
    """Return the matching files, in order, each once, also if several paths or links lead to it.

    Args:
        path: files, folders and globs (** is any depth).
        in_folder: returns the files of a folder, for example `files_in`.
        known: supported kinds of data, for messages.

    Raises:
        ValueError: if the path is empty, or an entry matches no file.
    """
    files: dict[str, str] = {}
    for given in [path] if isinstance(path, str) else path:
        place = os.path.expanduser(given)
        if os.path.isfile(place):
            found = [place]
        elif os.path.isdir(place):
            found = in_folder(given)
            if not found:
                raise ValueError(f"--data.path {given}: the folder has no table. Supported: {known}")
        elif glob.has_magic(place):
            found = sorted(file for file in glob.glob(place, recursive=True) if os.path.isfile(file))
            if not found:
                raise ValueError(f"--data.path {given}: no file matches")
        else:
            raise ValueError(
                f"--data.path {given}: no such file or folder ({os.path.abspath(place)}). Supported: {known}"
            )
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise ValueError(f"--data.path {path} is empty. Supported: {known}")
    return list(files.values())


def files_in(folder: str, suffixes: Sequence[str]) -> list[str]:
    """Return the files with one of these suffixes in a folder, or else in its subfolder `data`; sorted.

    Raises:
        ValueError: if files have different suffixes.
    """
    here = glob.escape(os.path.expanduser(folder))
    found = {
        suffix: sorted(glob.glob(os.path.join(here, f"*{suffix}")))
        or sorted(glob.glob(os.path.join(here, "data", f"*{suffix}")))
        for suffix in suffixes
    }
    kinds = [files for files in found.values() if files]
    if len(kinds) > 1:
        some = [files[0] for files in kinds]
        raise ValueError(
            f"--data.path {folder}: tables of several kinds, such as {some}; set it to the files of one kind"
        )
    return kinds[0] if kinds else []


def open_binary(path: str) -> BinaryIO:
    """Open a file for reading; with the suffix .gz, its decompressed content."""
    return cast(BinaryIO, gzip.open(path)) if path.endswith(".gz") else open(path, "rb")


def kind_of(path: str, known: str = "CSV, TSV, JSON Lines, Parquet") -> Literal["parquet", "json", "text"]:
    """Detect the kind of table by the first bytes of a file; `json` is JSON Lines.

    Args:
        path: the file.
        known: supported kinds of data, for messages.

    Raises:
        ValueError: if the kind is unknown, or the file is empty or cannot be read.
    """
    try:
        with open_binary(path) as stream:
            head = stream.read(2**12)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not head:
        raise ValueError(f"{path} is empty")
    if head.startswith(b"PAR1") and not path.endswith(".gz"):
        return "parquet"
    if b"\0" in head or head.startswith((b"\x1f\x8b", b"PAR1")):
        raise ValueError(f"{path}: unknown kind of file. Supported: {known}")
    return "json" if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else "text"


@contextmanager
def example_package(path: str) -> Iterator[None]:
    """Convert the error of a missing package of example data to one that names the command to install it.

    Raises:
        ValueError: if the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--data.path {path} needs the package {error.name}: pip install 'bigmodel[examples]'"
        ) from error
