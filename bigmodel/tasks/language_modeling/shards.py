"""Token ids on disk: written in sequence, read in windows.

A prepared folder::

    meta.json            `PreparedText`
    tokenizer.json       `Tokenizer.to_json`
    train-00000.bin      token ids, little-endian uint16 (uint32 if the vocabulary has more than 65,536), and nothing else;
    train-00001.bin      each shard but a split's last holds `shard_tokens`
    val-00000.bin
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from dataclasses import asdict, dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel.data.cache import write_text

VERSION = 1  # of this format
SHARD_TOKENS = 2**27

# The kernel maps up to 64 KiB around a page that is read: release all pages after this number of reads, or the resident
# memory of a run grows to the size of its text.
RELEASE_READS = 1024


@dataclass
class SplitStatistics:
    """Statistics of a split: tokens (including end-of-text), documents, bytes of UTF-8, and the tokens' SHA-256."""

    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass
class PreparedText:
    """Description of a prepared folder.

    Attributes:
        splits: statistics by name.
        vocab_size: number of token ids; every id is below it.
        end_of_text: id of the token after each document.
        dtype: of the shards.
        shard_tokens: tokens per full shard.
        tokenizer: name of the tokenizer's file.
        fingerprint: hash of the tokenizer and of all tokens.
        settings: tokenizer, split and sources that the text was prepared with.
        version: of this format.
    """

    splits: dict[str, SplitStatistics]
    vocab_size: int
    end_of_text: int
    dtype: str
    shard_tokens: int
    tokenizer: str
    fingerprint: str
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def save(self, folder: Path) -> None:
        """Write meta.json."""
        write_text(folder / "meta.json", json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, folder: Path) -> PreparedText:
        """Read meta.json."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        meta["splits"] = {name: SplitStatistics(**split) for name, split in meta["splits"].items()}
        return cls(**meta)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.bin"


class ShardWriter:
    """Writes the tokens of one split to the disk; a context manager.

    Args:
        folder: target folder.
        split: first part of the files' names.
        dtype: of the tokens.
        shard_tokens: tokens per shard.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.tokens = 0
        self._digest = hashlib.sha256()
        self._stream: BufferedWriter | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish_shard()

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens [n] of the writer's dtype."""
        self._digest.update(tokens.data)
        while len(tokens):
            number, filled = divmod(self.tokens, self.shard_tokens)
            if filled == 0:
                self._finish_shard()
                self._stream = open(shard_path(self.folder, self.split, number), "wb")  # noqa: SIM115
            assert self._stream is not None
            part = tokens[: self.shard_tokens - filled]
            self._stream.write(part.data)
            self.tokens += len(part)
            tokens = tokens[len(part) :]

    @property
    def sha256(self) -> str:
        """SHA-256 of all tokens written."""
        return self._digest.hexdigest()

    def _finish_shard(self) -> None:
        if self._stream is not None:
            with self._stream as stream:
                stream.flush()
                os.fsync(stream.fileno())
            self._stream = None


class TokenArray:
    """All tokens of one split, memory-mapped; cheap to pickle.

    Args:
        folder: a prepared folder.
        split: name of the split.

    Raises:
        ValueError: if a shard is missing, or its size differs from the one in meta.json.
    """

    def __init__(self, folder: Path, split: str) -> None:
        meta = PreparedText.load(folder)
        self.folder, self.split = folder, split
        self._length, self._shard_tokens = meta.splits[split].tokens, meta.shard_tokens
        self._dtype = np.dtype(meta.dtype)
        self._maps: list[mmap.mmap] = []
        self._shards: list[np.ndarray] = []
        self._reads = 0
        for number, start in enumerate(range(0, self._length, self._shard_tokens)):
            path = shard_path(folder, split, number)
            expected = min(self._shard_tokens, self._length - start) * self._dtype.itemsize
            size = path.stat().st_size if path.exists() else 0
            if size != expected:
                raise ValueError(
                    f"{path} is damaged: it has {size:,} bytes instead of {expected:,}. Delete {folder} and start again"
                )
            with open(path, "rb") as stream:
                self._maps.append(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ))
            self._shards.append(np.frombuffer(self._maps[-1], self._dtype))

    def __reduce__(self) -> tuple[type[TokenArray], tuple[Path, str]]:
        return TokenArray, (self.folder, self.split)

    def __len__(self) -> int:
        """Number of tokens."""
        return self._length

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` [n], of any integer type, with the tokens from `start` on."""
        done = 0
        while done < len(out):
            number, offset = divmod(start + done, self._shard_tokens)
            part = self._shards[number][offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
        self._reads += 1
        if self._reads % RELEASE_READS == 0:
            for mapping in self._maps:
                mapping.madvise(mmap.MADV_DONTNEED)
