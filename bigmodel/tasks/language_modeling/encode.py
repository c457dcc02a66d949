"""Tokenization in worker processes: documents to token ids, long documents in blocks.

A long document is cut into blocks of about `BLOCK_BYTES`, which limits memory and distributes it over processes. The
tokens are those of the whole document: a cut is made only where the text around it has the same tokens in one piece and
in two. For a byte-level tokenizer this is true before nearly every space, because the pieces of its pre-tokenizer do not
extend across one. If there is no such place (text without white space; a tokenizer that treats the start of a text
differently), the block grows until there is one, at most to the end of the document.

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np

from bigmodel.tasks.language_modeling.shards import token_dtype
from bigmodel.tasks.language_modeling.sources import Segment, iter_text, read_text
from bigmodel.tasks.language_modeling.tokenizer import Tokenizer, UnknownCharacter
from bigmodel.tasks.language_modeling.tokenizer_config import TokenizerConfig

BLOCK_BYTES = 2**17  # larger ones are no faster, and take 0.2 KB of memory per byte
SAMPLE_BYTES = 2**16  # size of a piece of training text of the tokenizer
CUT_SEARCH_BYTES = 2**16
CUT_CANDIDATES = 16
CUT_CONTEXT = 128  # characters on either side of a cut whose tokens must not change


@dataclass(frozen=True)
class TextBlock:
    """Bytes `start` to `stop` of a segment's file; both are moved forward to the next possible cut."""

    segment: Segment
    start: int
    stop: int
    step: int


def iter_text_blocks(segments: Iterable[Segment], block_bytes: int = BLOCK_BYTES) -> Iterator[list[TextBlock]]:
    """Yield lists of blocks of the segments, in order, each list of about `block_bytes`."""
    group: list[TextBlock] = []
    size = 0
    for segment in segments:
        for start in range(segment.start, segment.stop, block_bytes):
            block = TextBlock(segment, start, min(start + block_bytes, segment.stop), block_bytes)
            group.append(block)
            size += block.stop - block.start
            if size >= block_bytes:
                yield group
                group, size = [], 0
    if group:
        yield group


_tokenizers: dict[str, Tokenizer] = {}  # by file; each worker loads a tokenizer once


def encode_blocks(tokenizer_file: str, blocks: Sequence[TextBlock]) -> tuple[np.ndarray, int]:
    """Return the token ids [n] of the blocks, with end-of-text after each document, and the number of bytes of text.

    Raises:
        ValueError: if a character is not in the vocabulary; names file and byte offset.
    """
    tokenizer = _tokenizers.get(tokenizer_file)
    if tokenizer is None:
        with open(tokenizer_file, encoding="utf-8") as stream:
            tokenizer = _tokenizers[tokenizer_file] = Tokenizer.from_json(stream.read())
    dtype = token_dtype(tokenizer.vocab_size)
    pieces = []
    size = 0
    for block in blocks:
        start, stop = _block_range(tokenizer, block)
        size += stop - start
        text = read_text(block.segment, start, stop)
        try:
            pieces.append(np.array(tokenizer.encode_batch([text])[0], dtype))
        except UnknownCharacter as error:
            offset = start + len(text[: error.position].encode())
            raise ValueError(
                f"{block.segment.file.path}: character {error.character!r} at byte offset {offset:,} does not occur in the"
                " train split, whose characters are the vocabulary: train with --data.tokenizer Bytes or BPE, or another"
                " --data.split, or exclude the file by --data.exclude"
            ) from None
        if start < stop == block.segment.stop and block.segment.ends_document:
            pieces.append(np.array([tokenizer.eos_token_id], dtype))
    return np.concatenate(pieces), size


def _block_range(tokenizer: Tokenizer, block: TextBlock) -> tuple[int, int]:
    """Return the start and stop of the block's text in the file [bytes]; empty if it belongs to the previous block."""
    segment = block.segment
    start: int | None = block.start
    if block.start > segment.start:
        start = find_cut(tokenizer, segment, block.start, block.step)
    if start is None:
        return block.stop, block.stop
    for near in range(block.stop, segment.stop, block.step):
        stop = find_cut(tokenizer, segment, near, block.step)
        if stop is not None:
            return start, stop
    return start, segment.stop


def find_cut(tokenizer: Tokenizer, segment: Segment, near: int, step: int) -> int | None:
    """Return the first possible cut of the segment's text from `near` to `near + step` [bytes]; None if there is none."""
    first = max(segment.start, near - 4 * CUT_CONTEXT)
    last = min(near + min(step, CUT_SEARCH_BYTES), segment.stop)
    with open(segment.file.path, "rb") as stream:
        stream.seek(first)
        data = stream.read(min(last + 4 * CUT_CONTEXT, segment.stop) - first)
    middle = near - first
    while middle < len(data) and data[middle] & 0xC0 == 0x80:  # inside a character
        middle += 1
    if tokenizer.cut is None:
        return first + middle if first + middle < last else None
    before, after = data[:middle].decode("utf-8", "ignore"), data[middle:].decode("utf-8", "ignore")
    text = before + after
    end = len(before) + len(data[middle : last - first].decode("utf-8", "ignore"))
    for candidate in islice(tokenizer.cut.finditer(text, len(before), end), CUT_CANDIDATES):
        at = candidate.start()
        left, right = text[max(0, at - CUT_CONTEXT) : at], text[at : at + CUT_CONTEXT]
        if at < end and tokenizer.encode(left) + tokenizer.encode(right) == tokenizer.encode(left + right):
            return first + middle + len(text[len(before) : at].encode())
    return None


def make_tokenizer(tokenizer_config: TokenizerConfig, segments: Sequence[Segment]) -> str:
    """Build the tokenizer from the segments of the train split; return it as JSON."""
    return tokenizer_config.build(sample_text(segments, tokenizer_config.max_train_bytes)).to_json()


def sample_text(segments: Sequence[Segment], limit: int | None) -> Iterator[str]:
    """Yield pieces of the segments' text, evenly sampled: all of it, or about `limit` bytes."""
    ends = list(accumulate(segment.size for segment in segments))
    total = ends[-1] if ends else 0
    if limit is None or total <= limit:
        for segment in segments:
            yield from iter_text(segment, SAMPLE_BYTES)
        return
    count = max(limit // SAMPLE_BYTES, 1)
    size = min(limit, SAMPLE_BYTES)
    for k in range(count):
        start = k * total // count
        stop = start + size
        index = bisect_right(ends, start)
        while start < stop and index < len(segments):
            segment, first = segments[index], ends[index] - segments[index].size
            part = min(stop, ends[index])
            yield read_text(segment, segment.start + start - first, segment.start + part - first)
            start, index = part, index + 1
