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
from bigmodel.data.checksums import compare_checksums, write_checksums
from bigmodel.data.worker_pool import WorkerPool
from bigmodel.tasks.language_modeling.encode import BLOCK_BYTES, encode_blocks, iter_text_blocks, make_tokenizer
from bigmodel.tasks.language_modeling.shards import (
    SHARD_TOKENS,
    VERSION,
    PreparedText,
    ShardWriter,
    SplitStatistics,
    token_dtype,
)
from bigmodel.tasks.language_modeling.sources import Segment, find_files, scan
from bigmodel.tasks.language_modeling.splits import TextSplit
from bigmodel.tasks.language_modeling.tokenizer import Tokenizer
from bigmodel.tasks.language_modeling.tokenizer_config import TokenizerConfig

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # in each worker


@dataclass(frozen=True)
class Plan:
    """The input of a preparation, and its folder.

    Attributes:
        folder: the prepared folder.
        splits: the segments of each split.
        tokenizer_config: configuration of the tokenizer.
        settings: readable form of the key's inputs.
    """

    folder: Path
    splits: dict[str, list[Segment]]
    tokenizer_config: TokenizerConfig
    settings: dict[str, Any]

    @property
    def done(self) -> bool:
        """True if the folder exists."""
        return (self.folder / "meta.json").exists()


def make_plan(
    path: str | Sequence[str],
    tokenizer_config: TokenizerConfig,
    split: TextSplit,
    exclude: Sequence[str],
    cache_dir: str | None,
    evaluating: bool = False,
) -> Plan:
    """Find and check the input, split it, and compute its prepared folder. Writes only the scan.

    With `evaluating`, the train split may be empty. Other arguments are those of `TextData`.

    Raises:
        ValueError: if a file is missing, empty, unreadable or not UTF-8, or a split gets no document.
    """
    cache = cache_folder("language_modeling", cache_dir)
    files, empty = find_files(path, exclude)
    with disk_errors(cache), progress("checking", sum(file.size for file in files)) as advance:
        files = scan(files, cache, advance)
    splits = split.assign(files)
    for name, segments in splits.items():
        if not segments and not (evaluating and name == "train"):
            raise ValueError(
                f"the {name} split is empty: {len(files)} documents, split by {split}. Set --data.path to more files,"
                f" --data.split.{name} to a larger share, or --data.split to ContiguousSplit"
            )
    tokenizer = tokenizer_config.settings()
    settings = {**tokenizer, "split": str(split), "files": len(files), "empty_files_left_out": empty}
    contents = {n: [(s.file.sha256, s.start, s.stop) for s in segments] for n, segments in splits.items()}
    return Plan(cache / digest([VERSION, tokenizer, contents]), splits, tokenizer_config, settings)


def prepare(plan: Plan, num_processes: int | None = None) -> PreparedText:
    """Create the plan's folder, unless it exists. Any number of processes may call this at the same time.

    Args:
        plan: from `make_plan`.
        num_processes: worker processes; None: one per core.

    Raises:
        ValueError: if the tokenizer cannot be built, or a character is not in its vocabulary.
        OSError: if the disk is full; the message names the required space and the place.
    """
    if plan.done:
        compare_checksums(plan.folder)
        return PreparedText.load(plan.folder)
    with building(plan.folder) as folder:
        return _write(plan, folder, num_processes or available_cores())


def _write(plan: Plan, folder: Path, num_processes: int) -> PreparedText:
    """Write the prepared text into the folder."""
    start = time.monotonic()
    if empty := plan.settings["empty_files_left_out"]:
        say(f"excluded empty files: {first_of(empty, 3)}")
    total = sum(segment.size for segments in plan.splits.values() for segment in segments)
    read = written = 0  # [bytes]
    statistics = {}
    with disk_errors(folder.parent, lambda: written * total // max(read, 1)), ExitStack() as stack:
        workers = stack.enter_context(WorkerPool(min(num_processes, -(-total // BLOCK_BYTES)), ONE_THREAD))
        tokenizer = _make_tokenizer(plan, folder)
        dtype = token_dtype(tokenizer.vocab_size)
        advance = stack.enter_context(progress("tokenizing", total))
        encode = partial(encode_blocks, str(folder / "tokenizer.json"))
        for name, segments in plan.splits.items():
            with ShardWriter(folder, name, dtype, SHARD_TOKENS) as writer:
                for tokens, size in workers.map(encode, iter_text_blocks(segments, BLOCK_BYTES)):
                    read, written = read + size, written + tokens.nbytes
                    writer.write(tokens)
                    advance(size)
            size = sum(segment.size for segment in segments)
            statistics[name] = SplitStatistics(writer.tokens, len(segments), size, writer.sha256)
        prepared = PreparedText(
            splits=statistics,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.eos_token_id,
            dtype=dtype.str,
            shard_tokens=SHARD_TOKENS,
            tokenizer="tokenizer.json",
            fingerprint=digest(
                [VERSION, tokenizer.to_json(), {name: split.sha256 for name, split in statistics.items()}]
            ),
            settings=plan.settings,
        )
        prepared.save(folder)
        write_checksums(folder)
    counts = ", ".join(f"{name} {split.tokens:,}" for name, split in statistics.items())
    seconds = time.monotonic() - start
    say(f"prepared {total / 1e6:,.1f} MB in {seconds:,.1f} s in {plan.folder}")
    say(f"tokens: {counts}; vocabulary: {tokenizer.vocab_size:,}")
    return prepared


def _make_tokenizer(plan: Plan, folder: Path) -> Tokenizer:
    """Build and save the tokenizer, in a separate process, so that threads and memory of its training are released."""
    start = time.monotonic()
    if plan.tokenizer_config.max_train_bytes == 0:
        tokenizer = plan.tokenizer_config.build([])
    else:
        with WorkerPool(1) as workers:
            tokenizer = Tokenizer.from_json(workers.call(make_tokenizer, plan.tokenizer_config, plan.splits["train"]))
        say(f"built the tokenizer from the train split in {time.monotonic() - start:,.1f} s")
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    return tokenizer
