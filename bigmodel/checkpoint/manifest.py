"""Manifest of a sharded checkpoint: its files, tensors and checksums."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

STATE, MANIFEST = "state.ckpt", "manifest.json"
_HASHING_THREADS = 8


def shard_name(rank: int, num_processes: int) -> str:
    return f"shard-{rank}-of-{num_processes}.safetensors"


def file_facts(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, after flushing it to the disk."""
    with ThreadPoolExecutor(1) as thread, open(path, "rb") as file:
        digest = thread.submit(file_digest, path)  # in parallel with fsync
        os.fsync(file.fileno())
        return {"size": path.stat().st_size, "sha256": digest.result()}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text to the disk, completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, bytes and time of change (ns) of each file."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # renamed in the meantime
            found.append((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
    return sorted(found)


def _seal(text: str) -> str:
    """Return the prefix of a manifest's text, which holds its checksum."""
    return f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", '


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content)[1:]
    write_text(folder / MANIFEST, _seal(text) + text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sharded checkpoint.

    Raises:
        ValueError: if it is missing or damaged; the message states which.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    text = (folder / MANIFEST).read_bytes().decode(errors="replace")
    start = len(_seal(""))
    if text[:start] != _seal(text[start:]):
        raise ValueError(f"{MANIFEST} has changed since it was written")
    content: dict[str, Any] = json.loads("{" + text[start:])
    return content


def folder_damage(folder: Path) -> str | None:
    """Describe the damage of a sharded checkpoint, by the checksums of its files; None if it matches them.

    Reads all of it, once per process as long as none of its files changes.
    """
    return _folder_damage(folder, tuple(listing(folder)))


@functools.cache
def _folder_damage(folder: Path, listing: tuple[tuple[str, int, int], ...]) -> str | None:
    found = {name: size for name, size, _ in listing}
    if MANIFEST not in found and ".metadata" in found:
        print(f"{folder} has no checksum, and is not verified: Lightning wrote it", file=sys.stderr)
        return None
    try:
        written = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, facts in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != facts["size"]:
            return f"{name} has {found[name]:,} bytes, not {facts['size']:,}"
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as threads:  # hashing releases the GIL
        for name, digest in zip(written, threads.map(file_digest, (folder / name for name in written)), strict=True):
            if digest != written[name]["sha256"]:
                return f"{name} has changed since it was written: SHA-256 {digest[:8]}..., was {written[name]['sha256'][:8]}"
    return None
