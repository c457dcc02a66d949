"""Prepare text once: read files, write shards of token ids into a cache.

The key of a prepared folder is a hash of the documents' contents in their order, of their splits, and of the tokenizer;
not of paths, so a folder of text may be moved. Layout::

    <cache>/language_modeling/<key>/      see shards.py
    <cache>/language_modeling/scans/      see sources.py

This module imports neither torch nor Lightning.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bigmodel.data.cache import (
    available_cores,
    building,
    cache_folder,
    digest,
    disk_errors,
    first_of,
    progress,
    say,
    write_text,
)
from bigmodel.data.worker_pool import WorkerPool
from bigmodel.tasks.language_modeling.encode import BLOCK_BYTES, blocks_of, encode_blocks, make_tokenizer
from bigmodel.tasks.language_modeling.shards import (
    SHARD_TOKENS,
    VERSION,
    Prepared,
    ShardWriter,
    SplitFacts,
    token_dtype,
)
from bigmodel.tasks.language_modeling.sources import Segment, find_files, scan
from bigmodel.tasks.language_modeling.splits import Split
from bigmodel.tasks.language_modeling.tokenizer import Tokenizer
from bigmodel.tasks.language_modeling.tokenizer_config import TokenizerConfig

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # in each worker


@dataclass(frozen=True)
class Plan:
    """The input of a preparation, and its folder.

    Attributes:
        folder: the prepared folder.
        splits: the segments of each split.
        choice: the tokenizer.
        settings: the inputs of the key, for people to read.
    """

    folder: Path
    splits: dict[str, list[Segment]]
    choice: TokenizerConfig
    settings: dict[str, Any]

    @property
    def done(self) -> bool:
        """True if the folder exists."""
        return (self.folder / "meta.json").exists()


def make_plan(
    path: str | Sequence[str], choice: TokenizerConfig, split: Split, exclude: Sequence[str], cache_dir: str | None
) -> Plan:
    """Find and check the input, split it, and name its prepared folder. Writes only the scan.

    Raises:
        ValueError: if a file is missing, empty, unreadable or not UTF-8, or a split gets no document.
    """
    cache = cache_folder("language_modeling", cache_dir)
    files, empty = find_files(path, exclude)
    with disk_errors(cache), progress("checking", sum(file.size for file in files)) as advance:
        files = scan(files, cache, advance)
    splits = split.assign(files)
    for name, segments in splits.items():
        if not segments:
            raise ValueError(
                f"the {name} split gets no document: {len(files)} in all, dealt out by {split}. Give more files, or a larger"
                f" share (--data.split.{name}), or cut by position (--data.split ContiguousSplit)"
            )
    chosen = choice.settings()
    settings = {**chosen, "split": str(split), "files": len(files), "empty_files_left_out": empty}
    contents = {n: [(s.file.sha256, s.start, s.stop) for s in segments] for n, segments in splits.items()}
    return Plan(cache / digest([VERSION, chosen, contents]), splits, choice, settings)


def prepare(plan: Plan, num_processes: int | None = None) -> Prepared:
    """Make the plan's folder, unless it exists. Any number of processes may do so at the same time.

    Args:
        plan: from `make_plan`.
        num_processes: worker processes; None: one per core.

    Raises:
        ValueError: if the tokenizer cannot be made, or a character is not in its vocabulary.
        OSError: if the disk is full; the message names the required space and the place.
    """
    if plan.done:
        return Prepared.load(plan.folder)
    with building(plan.folder) as folder:
        return _write(plan, folder, num_processes or available_cores())


def _write(plan: Plan, folder: Path, num_processes: int) -> Prepared:
    """Fill the folder."""
    began = time.monotonic()
    if empty := plan.settings["empty_files_left_out"]:
        say(f"left out as empty: {first_of(empty, 3)}")
    total = sum(segment.size for segments in plan.splits.values() for segment in segments)
    read = written = 0  # [bytes]
    facts = {}
    with disk_errors(folder.parent, lambda: written * total // max(read, 1)), ExitStack() as stack:
        workers = stack.enter_context(WorkerPool(min(num_processes, -(-total // BLOCK_BYTES)), ONE_THREAD))
        tokenizer = _make_tokenizer(plan, folder)
        dtype = token_dtype(tokenizer.vocab_size)
        advance = stack.enter_context(progress("tokenizing", total))
        encode = partial(encode_blocks, str(folder / "tokenizer.json"))
        for name, segments in plan.splits.items():
            with ShardWriter(folder, name, dtype, SHARD_TOKENS) as writer:
                for tokens, size in workers.map(encode, blocks_of(segments, BLOCK_BYTES)):
                    read, written = read + size, written + tokens.nbytes
                    writer.write(tokens)
                    advance(size)
            size = sum(segment.size for segment in segments)
            facts[name] = SplitFacts(writer.tokens, len(segments), size, writer.sha256)
        prepared = Prepared(
            splits=facts,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
            dtype=dtype.str,
            shard_tokens=SHARD_TOKENS,
            tokenizer="tokenizer.json",
            fingerprint=digest([VERSION, tokenizer.to_json(), {name: split.sha256 for name, split in facts.items()}]),
            settings=plan.settings,
        )
        prepared.save(folder)
    counts = ", ".join(f"{name} {split.tokens:,}" for name, split in facts.items())
    seconds = time.monotonic() - began
    say(f"prepared {total / 1e6:,.1f} MB in {seconds:,.1f} s in {plan.folder}")
    say(f"tokens: {counts}; vocabulary: {tokenizer.vocab_size:,}")
    return prepared


def _make_tokenizer(plan: Plan, folder: Path) -> Tokenizer:
    """Make and save the tokenizer, in a process of its own, so that threads and memory of its training are released."""
    began = time.monotonic()
    if plan.choice.text_bytes == 0:
        tokenizer = plan.choice.make([])
    else:
        with WorkerPool(1) as workers:
            tokenizer = Tokenizer.from_json(workers.call(make_tokenizer, plan.choice, plan.splits["train"]))
        say(f"made the tokenizer from the train split in {time.monotonic() - began:,.1f} s")
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    return tokenizer
