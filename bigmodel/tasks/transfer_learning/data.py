"""Data module of labelled texts.

B texts, T tokens, K classes, N texts of a split.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Literal, get_args

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from bigmodel.data.cache import cache_folder, digest
from bigmodel.data.class_balance import class_weights
from bigmodel.data.module import BaseDataModule
from bigmodel.tasks.transfer_learning.batches import LabelledTextBatch, TextDataset, Texts
from bigmodel.tasks.transfer_learning.prepare import PreparedTexts, prepare
from bigmodel.tasks.transfer_learning.problem_type import REGRESSION, SINGLE_LABEL, ProblemType
from bigmodel.tasks.transfer_learning.pseudo_labels import prepare_predictions, select_predictions
from bigmodel.tasks.transfer_learning.sources import TextColumns, find_source
from bigmodel.tasks.transfer_learning.splits import Folds, TextSplit, divide, draw_shots, report_duplicates
from bigmodel.tasks.transfer_learning.targets import UNKNOWN, MultiHotTargets, select_targets, training_classes
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder, read_encoder


class LabelledTextData(BaseDataModule):
    """Texts for classification or regression, from tables or a public dataset, tokenized once into a cache.

    Splits that the source lacks are drawn from its training texts; equal texts are in the same split. Batches are
    padded to their longest text, and training batches contain texts of similar length.

    Args:
        path: tables of texts (CSV, TSV, JSON Lines, Parquet; files, a folder or a glob; files named train, validation or
            test are these splits), a dataset saved by Hugging Face datasets, hf://owner/name, or {fine_foods}. For
            prediction: the same, without labels.
        text_column: column of the texts.
        pair_column: column of the second texts, for sentence pairs.
        label_column: classes (text or integers), numbers, or lists of classes (Arrow or JSON lists, or text separated
            by | or ;).
        split_column: train, validation or test; by default the split is taken from the file names, if they contain it.
        problem_type: single_label_classification, multi_label_classification or regression; auto: regression for
            floats, multi-label for lists, single-label for all other labels.
        tokenizer: folder or owner/name of a Hugging Face tokenizer; by default the task's own, its `text_encoder`.
        max_length: T, texts are truncated to so many tokens; by default the number of positions of the model.
        split: shares of the texts for validation and test, if the source has no splits.
        shots: number of training texts per class, drawn by --data.seed; by default all texts are used.
        folds: k-fold cross-validation instead of a validation share; the test split is not part of it.
        fold: index of the fold that is the validation split, from 0; by default the first, but `bigmodel fit` runs all
            folds.
        balance: for skewed classes; `weights`: weights the loss of a text by the inverse size of its class; `samples`:
            oversamples small classes.
        pseudo_labels: a file that `bigmodel predict` wrote for unlabelled texts, which are added to the training texts.
        min_confidence: minimum probability of a prediction that is used as a pseudo-label.
        group_by_length: make training batches of texts of similar length.
        batch_size: texts per optimizer step over all processes.
        micro_batch_size: texts per forward pass of one process; by default its whole share of the batch.
        cache_dir: folder of the prepared texts; by default $BIGMODEL_CACHE or ~/.cache/bigmodel.
        num_workers: processes that prefetch batches; 0 reads them in the training process, which takes microseconds per
            text.
        seed: with the epoch, determines the order of the texts; also the draw of `shots`.

    Attributes:
        sizes: sizes that the net is built with: num_classes, 1 for regression. Set by `setup`, like all below, but not
            when predicting.
        fingerprint: hash of the texts, their labels, their splits and the settings of reading.
        classes: names, by class number; [] for regression.
        problem_type: type of the targets.
        encoder: the tokenizer. Also set when predicting.
    """

    sizes: dict[str, int]
    fingerprint: str
    classes: list[str]
    problem_type: ProblemType
    encoder: TextEncoder

    def __init__(
        self,
        path: str | list[str],
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        split_column: str | None = None,
        problem_type: Literal[
            "auto", "single_label_classification", "multi_label_classification", "regression"
        ] = "auto",
        tokenizer: str | None = None,
        max_length: int | None = None,
        split: TextSplit | None = None,
        shots: int | None = None,
        folds: int | None = None,
        fold: int | None = None,
        balance: Literal["none", "weights", "samples"] = "none",
        pseudo_labels: str | None = None,
        min_confidence: float = 0.9,
        group_by_length: bool = True,
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for flag, value, accepted in (
            ("problem_type", problem_type, ("auto", *get_args(ProblemType))),
            ("balance", balance, ("none", "weights", "samples")),
        ):
            if value not in accepted:
                raise ValueError(f"--data.{flag} {value}: accepted are {', '.join(accepted)}")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"--data.min_confidence {min_confidence}: a probability, 0 to 1, is accepted")
        if folds is None and fold is not None:
            raise ValueError(f"--data.fold {fold} requires --data.folds: set it to the number of folds")
        self.path, self.tokenizer, self.max_length = path, tokenizer, max_length
        self.columns = TextColumns(text_column, pair_column, label_column, split_column)
        self._problem_type, self.balance = problem_type, balance
        self.split, self.shots = split or TextSplit(), shots
        self.folds = None if folds is None else Folds(folds, fold or 0)
        self.pseudo_labels, self.min_confidence, self.group_by_length = pseudo_labels, min_confidence, group_by_length
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.cache_dir, self.num_workers, self.seed = cache_dir, num_workers, seed
        self._splits: dict[str, tuple[Texts, np.ndarray | MultiHotTargets]] = {}

    def prepare_data(self) -> None:
        """Read, check and tokenize the texts, unless the cache already holds them for these settings.

        Raises:
            ValueError: if the input or a setting is invalid; the message names the file and row and the remedy.
        """
        self._prepare(predicting=self.is_running(TrainerFn.PREDICTING))

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared texts, and split them.

        Raises:
            ValueError: if the requested splits are impossible.
        """
        if stage == "predict":
            prepared = self._prepare(predicting=True)
            texts = Texts([(prepared, np.arange(len(prepared)))])
            self._splits["all"] = texts, np.full(len(texts), UNKNOWN)
            self._report_truncation(["all"])
        elif "train" not in self._splits:
            self._make_splits(self._prepare(predicting=False))

    def _prepare(self, predicting: bool) -> PreparedTexts:
        """Return the prepared texts, from their folder."""
        self.encoder = encoder = self._find_encoder()
        cache = cache_folder("transfer_learning", self.cache_dir)
        columns = TextColumns(self.columns.text, self.columns.pair, None) if predicting else self.columns
        source = find_source(self.path, columns=columns, cache=cache)
        if self.pseudo_labels is not None and not predicting:
            self._predicted = prepare_predictions(self.pseudo_labels, columns.pair is not None, encoder, cache)
        prepared = prepare(source, columns, self._problem_type, encoder, cache)
        own, labels = self._evaluated_problem_type, prepared.labels
        if self._problem_type == "auto" and own is not None and labels is not None and labels.problem_type != own:
            prepared = prepare(source, columns, own, encoder, cache)
        return prepared

    @property
    def _evaluated_problem_type(self) -> str | None:
        """Problem type of the run that is evaluated; None in a fit."""
        if not (self.is_running(TrainerFn.VALIDATING) or self.is_running(TrainerFn.TESTING)):
            return None
        metadata = getattr(getattr(self.trainer, "lightning_module", None), "data_metadata", None) or {}
        return metadata.get("problem_type")

    def _find_encoder(self) -> TextEncoder:
        own: TextEncoder | None = getattr(getattr(self.trainer, "lightning_module", None), "text_encoder", None)
        if own is None and self.tokenizer is None:
            raise ValueError(
                "the task has no tokenizer (attribute `text_encoder`): set --data.tokenizer to a folder or owner/name, or"
                " --model.backbone to a model of texts"
            )
        given = read_encoder(self.tokenizer) if self.tokenizer is not None else None
        if own is not None and given is not None and own.fingerprint != given.fingerprint:
            raise ValueError(
                f"--data.tokenizer {self.tokenizer} differs from the backbone's tokenizer: set --data.tokenizer null"
            )
        encoder = own or given
        assert encoder is not None
        if self.max_length is not None:
            encoder.num_text_tokens(self.max_length, self.columns.pair is not None)
            if encoder.max_length is not None and self.max_length > encoder.max_length:
                raise ValueError(
                    f"--data.max_length {self.max_length} exceeds the positions of the model: at most {encoder.max_length}"
                    " is accepted"
                )
        return encoder

    @property
    def _limit(self) -> int | None:
        """T, the number of tokens that texts are truncated to."""
        return self.encoder.max_length if self.max_length is None else self.max_length

    def _make_splits(self, prepared: PreparedTexts) -> None:
        labels = prepared.labels
        assert labels is not None
        self.problem_type = labels.problem_type
        if self.balance != "none" and labels.problem_type != SINGLE_LABEL:
            raise ValueError(
                f"--data.balance {self.balance} requires {SINGLE_LABEL}, and the labels are for {labels.problem_type}:"
                " set --data.balance none"
            )
        rows = divide(prepared, self.split, self.folds, self.print_line)
        report_duplicates(prepared, rows, self.print_line)
        self.classes = training_classes(prepared, rows)
        if self.shots is not None:
            rows["train"] = draw_shots(prepared, rows["train"], self.classes, self.shots, self.seed)
        for name, which in rows.items():
            self._splits[name] = Texts([(prepared, which)]), select_targets(labels, self.classes, which)
        marks = [prepared.fingerprint, {name: _digest_rows(which) for name, which in rows.items()}]
        if self.pseudo_labels is not None:
            marks += self._add_predicted(prepared, rows)
        self.sizes = {"num_classes": max(len(self.classes), 1)}
        self.fingerprint = digest([*marks, self.classes, self.balance, self._limit, self.group_by_length])
        self._report_truncation(list(rows))
        counts = ", ".join(f"{name} {len(self._splits[name][0]):,}" for name in rows)
        what = REGRESSION if labels.problem_type == REGRESSION else f"{len(self.classes):,} classes"
        self.print_line(f"texts: {counts}; {what}")

    def _add_predicted(self, prepared: PreparedTexts, rows: dict[str, np.ndarray]) -> list[Any]:
        """Add pseudo-labelled texts to the training split; return what the fingerprint must include for them."""
        if self.problem_type != SINGLE_LABEL:
            raise ValueError(
                f"--data.pseudo_labels requires {SINGLE_LABEL}, and the labels are for {self.problem_type}: set it to null"
            )
        labelled = prepared.contents[np.concatenate(list(rows.values()))]
        chosen, classes = select_predictions(
            self._predicted, self.classes, self.min_confidence, labelled, self.print_line
        )
        texts, targets = Texts([(prepared, rows["train"]), (self._predicted, chosen)]), self._splits["train"][1]
        assert isinstance(targets, np.ndarray)
        self._splits["train"] = texts, np.concatenate([targets, classes])
        return [self._predicted.fingerprint, _digest_rows(chosen)]

    def _report_truncation(self, splits: list[str]) -> None:
        lengths = np.concatenate([self._splits[name][0].lengths for name in splits])
        if self._limit is not None and (longer := lengths > self._limit).any():
            self.print_line(
                f"{100 * longer.mean():.1f} % of the texts are longer than {self._limit} tokens (the longest has"
                f" {lengths.max():,}), and are truncated at the end"
            )

    def texts(self, split: str) -> Texts:
        """Return the texts of a split (train, val, test; when predicting, all).

        Raises:
            ValueError: if there is no such split.
        """
        return self._split(split)[0]

    def _split(self, split: str) -> tuple[Texts, np.ndarray | MultiHotTargets]:
        if split not in self._splits:
            raise ValueError(
                f"the data have no {split} split, only {', '.join(self._splits)}: set --data.split.{split} to a share, or"
                f" add texts for it (a file named {split}, or --data.split_column)"
            )
        return self._splits[split]

    def content_hashes(self, split: str) -> np.ndarray | None:
        return self._splits[split][0].contents if split in self._splits else None

    def class_weights(self) -> np.ndarray:
        """[K] float32, inverse to the sizes of the classes, with mean 1 over the training texts."""
        targets = self._split("train")[1]
        assert isinstance(targets, np.ndarray)
        return class_weights(np.bincount(targets, minlength=len(self.classes)))

    def target_statistics(self) -> tuple[float, float]:
        """Return mean and standard deviation of the training targets for regression; else 0 and 1."""
        targets = self._split("train")[1]
        if self.problem_type != REGRESSION or not isinstance(targets, np.ndarray):
            return 0.0, 1.0
        return float(targets.mean(dtype=np.float64)), float(targets.std(dtype=np.float64)) or 1.0

    def make_dataset(self, split: str) -> TextDataset:
        texts, targets = self._split(split)
        if split != "train":  # predictions are written in the order of the file
            return TextDataset(texts, targets, self.encoder, self._limit, self.seed, by_length=split != "all")
        weights = self.class_weights() if self.balance == "weights" else None
        return TextDataset(texts, targets, self.encoder, self._limit, self.seed, weights, self.balance == "samples")

    def has_validation(self) -> bool:
        return "val" in self._splits

    def train_options(self, dataset: TextDataset) -> dict[str, Any]:
        return {"lengths": dataset.lengths if self.group_by_length else None}

    def predict_dataloader(self) -> DataLoader[LabelledTextBatch]:
        """Return a loader of all texts at the path in their order, of whichever split."""
        return self.evaluation_loader("all")


def _digest_rows(rows: np.ndarray) -> str:
    return sha256(rows.astype("<i8").tobytes()).hexdigest()
