"""Data module, dataset and batch: text as packed windows of tokens.

Dimensions: B sequences, T context length [tokens].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import Dataset

from bigmodel.data.checksums import compare_checksums
from bigmodel.data.module import BaseDataModule
from bigmodel.data.sampling import Permutation
from bigmodel.data.stateless_rng import random_bits
from bigmodel.nn.loss import IGNORE_INDEX
from bigmodel.tasks.language_modeling.prepare import Plan, make_plan, prepare
from bigmodel.tasks.language_modeling.shards import PreparedText, TokenArray
from bigmodel.tasks.language_modeling.sources import iter_text, read_text
from bigmodel.tasks.language_modeling.splits import DocumentHashSplit, TextSplit
from bigmodel.tasks.language_modeling.tokenizer import Tokenizer
from bigmodel.tasks.language_modeling.tokenizer_config import BPE, TokenizerConfig, Trained

MAX_PROMPT_BYTES = 2**14  # of the start of a document that is used as a prompt
_PIECE_BYTES = 2**10  # smallest piece of a document in `TextData.content_hashes`
_NUM_PIECES = 2**10  # of a larger document


class TextBatch(NamedTuple):
    """Windows of tokens.

    Attributes:
        tokens: [B, T] int64, the input.
        targets: [B, T] int64, the next token of each; -100 past the end of a split.
        index: [B] int64, number of the window in its split.
        weight: [B] float32, 0 for padding rows.
    """

    tokens: Tensor
    targets: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    weight: Tensor


class TextWindows(Dataset[TextBatch]):
    """Dataset of the windows of T tokens of a split.

    The input of window i is tokens iT to iT + T - 1, its targets are their successors: every token but the first is
    predicted exactly once.

    Args:
        tokens: tokens of the split.
        context_length: T.
        eos_token_id: pads the input after the end of the split.
        partial: include a last window with fewer than T targets.
    """

    def __init__(self, tokens: TokenArray, context_length: int, eos_token_id: int, partial: bool) -> None:
        self.tokens, self.context_length, self.eos_token_id = tokens, context_length, eos_token_id
        self.num_predicted = len(tokens) - 1
        self._length = (self.num_predicted + (context_length - 1) * partial) // context_length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> TextBatch:
        """Return one window, without the batch dimension."""
        return TextBatch(*(field[0] for field in self.__getitems__([index])))

    def __getitems__(self, indices: list[int]) -> TextBatch:
        """Return the windows of these numbers as one batch."""
        T = self.context_length
        windows = np.empty((len(indices), T + 1), np.int64)
        for row, index in zip(windows, indices, strict=True):
            length = min(T + 1, len(self.tokens) - index * T)
            self.tokens.read(index * T, row[:length])
            row[length:] = IGNORE_INDEX
        ids = torch.from_numpy(windows)
        inputs = ids[:, :-1].masked_fill(ids[:, :-1] == IGNORE_INDEX, self.eos_token_id)
        return TextBatch(inputs, ids[:, 1:].contiguous(), torch.tensor(indices), torch.ones(len(indices)))


class TextData(BaseDataModule):
    """Data module: windows of tokens from files of text or code, which are tokenized once into a cache.

    `validate` and `test` of a run tokenize with the tokenizer of the run, whatever the text, and accept an empty train
    split.

    Args:
        path: files, folders or globs (** is any depth); each UTF-8 file is one document. In a folder, the files with a
            suffix of text or code are used. Tables (.jsonl, .csv, .parquet, ...) are refused. {stdlib} is the folder of
            this Python's standard library.
        tokenizer: BPE (by default), Pretrained, FromRun, Bytes or Characters, all of bigmodel.tasks.language_modeling.
        split: DocumentHashSplit (by default), ContiguousSplit or FileSplit; assigns documents to validation and test.
        context_length: tokens per sequence.
        batch_size: sequences per optimizer step over all processes.
        micro_batch_size: sequences per forward pass of one process; by default its whole share of the batch.
        exclude: patterns of files to exclude, matched against the path below the folder or glob; * also matches /.
        cache_dir: folder of the prepared text; by default $BIGMODEL_CACHE or ~/.cache/bigmodel.
        num_processes: processes that tokenize; by default one per core.
        num_workers: processes that prefetch batches; 0 reads them in the training process, which takes microseconds.
        seed: with the epoch, determines the order of the sequences.

    Attributes:
        sizes: sizes that the net is built with: vocab_size, context_length. Set by `setup`, like all below.
        fingerprint: hash of the tokens and the tokenizer.
        tokenizer: the loaded `Tokenizer`.
        prepared: description of the prepared folder.
    """

    sizes: dict[str, int]
    fingerprint: str
    tokenizer: Tokenizer
    prepared: PreparedText

    def __init__(
        self,
        path: str | list[str],
        tokenizer: TokenizerConfig | None = None,
        split: TextSplit | None = None,
        context_length: int = 256,
        batch_size: int = 16,
        micro_batch_size: int | None = None,
        exclude: list[str] | None = None,
        cache_dir: str | None = None,
        num_processes: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if context_length < 1:
            raise ValueError(f"--data.context_length {context_length}: must be at least 1")
        if num_processes is not None and num_processes < 1:
            raise ValueError(f"--data.num_processes {num_processes}: must be at least 1, or null for one per core")
        self.path, self.exclude = path, exclude or []
        self.tokenizer_config, self.split = tokenizer or BPE(), split or DocumentHashSplit()
        self.cache_dir, self.num_processes, self.num_workers = cache_dir, num_processes, num_workers
        self.context_length, self.batch_size, self.micro_batch_size = context_length, batch_size, micro_batch_size
        self.seed = seed
        self._plan: Plan | None = None
        self._windows: dict[str, TextWindows] = {}

    @property
    def plan(self) -> Plan:
        """Checked input, assigned to splits, and the folder of the prepared text."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    @property
    def _evaluated(self) -> Tokenizer | None:
        """Tokenizer of the run that is evaluated; None in a fit."""
        if not (self.is_running(TrainerFn.VALIDATING) or self.is_running(TrainerFn.TESTING)):
            return None
        found = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        return found if isinstance(found, Tokenizer) else None

    def _make_plan(self) -> Plan:
        arguments = (self.split, self.exclude, self.cache_dir)
        if (tokenizer := self._evaluated) is None:
            return make_plan(self.path, self.tokenizer_config, *arguments)
        trained, given = Trained(tokenizer.to_json()), self.tokenizer_config
        if given.max_train_bytes != 0:
            plan = make_plan(self.path, given, *arguments, evaluating=True)
            same = plan.done and _read_tokenizer(plan) == trained.json  # the text of the run: already prepared
            return plan if same else make_plan(self.path, trained, *arguments, evaluating=True)
        try:
            own = given.build(()).to_json()
        except (ValueError, OSError):  # its files are not needed, because the checkpoint has the tokenizer
            return make_plan(self.path, trained, *arguments, evaluating=True)
        if own != trained.json:
            raise ValueError(
                f"--data.tokenizer {given} is not the tokenizer of the run: leave it out, because a run is evaluated with"
                " its own tokenizer"
            )
        return make_plan(self.path, given, *arguments, evaluating=True)

    def prepare_data(self) -> None:
        """Tokenize the text, unless the cache holds it for these settings.

        Raises:
            ValueError: if the input or a setting is invalid; see `make_plan`.
            OSError: if the disk is full.
        """
        prepare(self.plan, self.num_processes)

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared text.

        Raises:
            ValueError: if it was not prepared, or the train split has no window.
        """
        if self._windows:
            return
        folder = self.plan.folder
        if not self.plan.done:
            raise ValueError(f"the text is not prepared ({folder} does not exist): call prepare_data first")
        compare_checksums(folder)
        self.prepared = PreparedText.load(folder)
        T, splits = self.context_length, self.prepared.splits
        if splits["train"].tokens <= T and self._evaluated is None:
            raise ValueError(
                f"the train split has {splits['train'].tokens:,} tokens, but one window needs {T + 1:,}: set"
                " --data.path to more text, or --data.context_length to a smaller number"
            )
        self.tokenizer = Tokenizer.from_json((folder / self.prepared.tokenizer).read_text(encoding="utf-8"))
        self.sizes = {"vocab_size": self.prepared.vocab_size, "context_length": T}
        self.fingerprint = self.prepared.fingerprint
        self._windows = {
            name: TextWindows(TokenArray(folder, name), T, self.prepared.end_of_text, partial=name != "train")
            for name in splits
            if splits[name].tokens
        }

    def windows(self, split: str) -> TextWindows:
        """Return the dataset of a split.

        Raises:
            ValueError: if there is no such split.
        """
        if split not in self._windows:
            raise ValueError(f"no {split} split; the splits are {sorted(self._windows)}: set --data.split.{split}")
        return self._windows[split]

    def content_hashes(self, split: str) -> np.ndarray:
        """Return a hash [N] int64 of each piece of the documents of a split: 1 KiB, or 1/1024 of a larger document."""
        segments = self.plan.splits.get(split, [])
        sizes = np.array([max(_PIECE_BYTES, segment.file.size // _NUM_PIECES) for segment in segments], np.int64)
        firsts = -(-np.array([segment.start for segment in segments], np.int64) // sizes)  # pieces that begin here
        counts = -(-np.array([segment.stop for segment in segments], np.int64) // sizes) - firsts
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - firsts, counts)
        documents = np.array([int(segment.file.sha256[16:32], 16) for segment in segments], np.uint64)
        return np.repeat(documents.view(np.int64), counts) ^ random_bits(numbers, 0, 1)[:, 0]

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes per predicted token; bits per byte = loss / ln 2 / this, for a loss in nats per token."""
        return self.prepared.splits[split].bytes / self.windows(split).num_predicted

    def split_text(self, split: str) -> Iterator[str]:
        """Yield the raw text of a split, in pieces of at most 64 KiB, with nothing between documents."""
        for segment in self.plan.splits[split]:
            yield from iter_text(segment)

    def prompts(self, numbers: Sequence[int], seed: int) -> list[str]:
        """Return the starts of documents of the train split, up to `MAX_PROMPT_BYTES` of each.

        Number n is the n-th document (modulo their number) in a shuffled order that depends on the seed. Does not
        require `setup`.

        Raises:
            ValueError: if no document starts in the train split.
        """
        documents = [segment for segment in self.plan.splits["train"] if segment.start == 0]
        if not documents:
            raise ValueError("no document starts in the train split: set --data.split to another one")
        order = Permutation(len(documents), seed, 0)(np.array(numbers) % len(documents))
        chosen = [documents[i] for i in order.tolist()]
        return [read_text(segment, stop=min(segment.stop, MAX_PROMPT_BYTES)) for segment in chosen]

    def make_dataset(self, split: str) -> TextWindows:
        return self.windows(split)

    def has_validation(self) -> bool:
        return "val" in self._windows


def _read_tokenizer(plan: Plan) -> str:
    compare_checksums(plan.folder)
    return (plan.folder / PreparedText.load(plan.folder).tokenizer).read_text(encoding="utf-8")
