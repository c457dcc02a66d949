"""Checksums of the files of a cache, written when it is built and compared when it is opened.

`checksums.json` holds the CRC-32 of each block of 1 MiB of each file. Opening compares all blocks of small caches; of
large ones, those of small files, and a random sample of the rest. `bigmodel check` compares all (`whole`). Caches of
earlier versions have no checksums, and are read as they are.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bigmodel.data.cache import dumps, loads, write_text

FILE = "checksums.json"
BLOCK_BYTES = 2**20
WHOLE_BYTES = 2**26  # caches up to this size are compared completely
NUM_SAMPLED = 32  # blocks of a larger one

_options = {"whole": False}
_compared: set[tuple[Any, ...]] = set()  # caches as they were when this process compared them


@contextmanager
def whole() -> Iterator[None]:
    """Compare all blocks of the caches that are opened in this context, whatever their size."""
    before, _options["whole"] = _options["whole"], True
    try:
        yield
    finally:
        _options["whole"] = before


def write_checksums(folder: Path, without: tuple[str, ...] = ()) -> None:
    """Write the checksums of all files of a finished folder, before it is published.

    Args:
        folder: the folder, still under its temporary name.
        without: names of files that do not belong to the cache.
    """
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, [_crc(block) for block in _blocks(path)]]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE and path.name not in without
    }
    write_text(folder / FILE, dumps(files))


def compare_checksums(folder: Path) -> None:
    """Compare the files of a cache with its checksums.

    Raises:
        ValueError: if a file is missing or damaged; names it and the folder to delete.
    """
    if not (folder / FILE).exists():
        return
    try:
        files: dict[str, Any] = loads((folder / FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder / FILE, folder, "not the content that was written") from error
    state = []
    for name, (size, _) in files.items():
        path = folder / name
        stat = path.stat() if path.is_file() else None
        if stat is None or stat.st_size != size:
            raise _damaged(path, folder, f"{stat.st_size if stat else 0:,} bytes, not {size:,}")
        state.append((name, size, stat.st_mtime_ns))
    key = (folder.absolute(), _options["whole"], *state)
    if key in _compared:
        return
    for name, number in _choose(files):
        path = folder / name
        with open(path, "rb") as stream:
            stream.seek(number * BLOCK_BYTES)
            if _crc(stream.read(BLOCK_BYTES)) != files[name][1][number]:
                raise _damaged(path, folder, f"the checksum of bytes from {number * BLOCK_BYTES:,} on does not match")
    _compared.add(key)


def _choose(files: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the blocks to compare: file and number."""
    blocks = [(name, number) for name, (_, crcs) in files.items() for number in range(len(crcs))]
    if _options["whole"] or sum(size for size, _ in files.values()) <= WHOLE_BYTES:
        return blocks
    small = [block for block in blocks if len(files[block[0]][1]) == 1]
    large = [block for block in blocks if len(files[block[0]][1]) > 1]
    # Not the global random state, which must not depend on caches.
    return [*small, *random.SystemRandom().sample(large, min(NUM_SAMPLED, len(large)))]


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block


def _crc(block: bytes) -> int:
    return zlib.crc32(block)


def _damaged(path: Path, folder: Path, problem: str) -> ValueError:
    return ValueError(f"{path} is damaged: {problem}. Delete {folder} and start again")
