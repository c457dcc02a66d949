"""Data module of recommendation: events of users as batches.

B rows, T positions of a window, I items, U users, N events.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from bigmodel.data.cache import cache_folder, digest
from bigmodel.data.module import BaseDataModule
from bigmodel.tasks.recommendation.batches import EvalBatch, HistoryDataset, PairDataset, SequenceDataset, UserDataset
from bigmodel.tasks.recommendation.filters import Filters
from bigmodel.tasks.recommendation.interactions import Interactions, SparseMatrix, ranges
from bigmodel.tasks.recommendation.prepare import PreparedInteractions, prepare
from bigmodel.tasks.recommendation.sources import InteractionColumns, find_source
from bigmodel.tasks.recommendation.sources.events import SPLITS
from bigmodel.tasks.recommendation.splits import ByFile, InteractionSplit, LeaveOneOut, SplitInteractions

ExampleType = Literal["sequences", "pairs", "users"]


class InteractionData(BaseDataModule):
    """Data module: user-item events from tables or a public dataset, sorted and numbered once into a cache.

    The task's attribute `example_type` determines the type of the training batches, unless `example_type` is set here. A
    task with a list `item_ids` of the ids of its items (see `IdTable.ids`; item 1 first) can predict for the users of
    other data: their events then have the task's item numbers, and events of unknown items are excluded. In evaluation,
    data with other items are an error.

    Args:
        path: tables of events (CSV, TSV, JSON Lines, Parquet, also .gz; files, a folder or a glob), MovieLens as published
            (a folder with u.data, ratings.dat or ratings.csv), RecBole's .inter files, hf://owner/name, or {movielens}.
            Files named by split (x.train.inter, x.valid.inter, x.test.inter) are these splits.
        user_column: ids of users, whole numbers or text; by default user_id or userId.
        item_column: ids of items, likewise; by default item_id or movieId.
        rating_column: numbers; by default rating, if there is such a column.
        time_column: seconds, milliseconds, microseconds or nanoseconds since 1970 (detected by their size), dates
            such as 20240131, text in ISO format, or timestamps; by default timestamp, time, date, datetime or created_at, if
            there is such a column. Without times, events are in the order of the source.
        column_names: of text tables without a header line, one for each column: [user_id,item_id,rating,timestamp].
        filters: rules that exclude events; by default none.
        split: LeaveOneOut (by default, unless files are named by split), GlobalTime or Ratio, all of
            bigmodel.tasks.recommendation.
        example_type: a training sample is a window of a user's events (`sequences`), one event (`pairs`), or a user with
            all events (`users`); by default that of the task.
        max_length: T, maximum number of events in the input of a net (RecBole: MAX_ITEM_LIST_LENGTH).
        stride: events between the starts of consecutive training windows, 1 to T; by default T.
        batch_size: windows, events or users per optimizer stride over all processes.
        micro_batch_size: of those, the number per forward pass of one process; by default its whole share of the batch.
        cache_dir: folder of the prepared events; by default $BIGMODEL_CACHE or ~/.cache/bigmodel.
        num_workers: processes that prefetch batches; 0 reads them in the training process, which takes microseconds per
            row.
        seed: with the epoch, determines the order of the samples and their keys.

    Attributes:
        sizes: sizes that the net is built with: num_items, max_length; num_users too if example_type are pairs or users.
            Set by `setup`, like all below, but not when predicting.
        fingerprint: hash of the events and their splits.
        parts: the events, split.
        prepared: the events, and the ids of users and items; also set when predicting.
    """

    sizes: dict[str, int]
    fingerprint: str
    prepared: PreparedInteractions
    parts: SplitInteractions

    def __init__(
        self,
        path: str | list[str],
        user_column: str | None = None,
        item_column: str | None = None,
        rating_column: str | None = None,
        time_column: str | None = None,
        column_names: list[str] | None = None,
        filters: Filters | None = None,
        split: InteractionSplit | None = None,
        example_type: ExampleType | None = None,
        max_length: int = 50,
        stride: int | None = None,
        batch_size: int = 128,
        micro_batch_size: int | None = None,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"--data.max_length {max_length}: must be at least 1")
        if stride is not None and not 1 <= stride <= max_length:
            raise ValueError(
                f"--data.stride {stride}: must be in 1 to --data.max_length {max_length}, or events between windows are lost"
            )
        if example_type not in (None, "sequences", "pairs", "users"):
            raise ValueError(f"--data.example_type {example_type}: must be sequences, pairs or users")
        self.path, self.filters, self.split = path, filters or Filters(), split or LeaveOneOut()
        self._is_default_split = split is None
        self.columns = InteractionColumns(user_column, item_column, rating_column, time_column, column_names)
        self._example_type, self.max_length, self.stride = (
            example_type,
            max_length,
            max_length if stride is None else stride,
        )
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.cache_dir, self.num_workers, self.seed = cache_dir, num_workers, seed
        self._prepared: PreparedInteractions | None = None

    @property
    def example_type(self) -> str:
        """Type of the training samples.

        Raises:
            ValueError: if the task requests an unknown type.
        """
        if self._example_type is not None:
            return self._example_type
        requested = getattr(getattr(self.trainer, "lightning_module", None), "example_type", "sequences")
        if requested not in ("sequences", "pairs", "users"):
            raise ValueError(f"the task's `example_type` is {requested!r}: must be sequences, pairs or users")
        return str(requested)

    def prepare_data(self) -> None:
        """Read, filter, sort and number the events, unless the cache has them for these settings.

        Raises:
            ValueError: if the input or a setting is invalid; the message has the file or row and the remedy.
        """
        self._prepare()

    def _prepare(self) -> PreparedInteractions:
        if self._prepared is None:
            cache = cache_folder("recommendation", self.cache_dir)
            source = find_source(self.path, columns=self.columns, cache=cache)
            self._prepared = prepare(source, self.columns, self.filters, cache)
            given = self._prepared.events.splits
            if given is not None and self._is_default_split:
                self.split = ByFile(tuple(name for i, name in enumerate(SPLITS) if i and (given == i).any()))
            elif given is not None:
                self.print_line(
                    f"files are named by split, but concatenated and split again by --data.split {self.split}"
                )
        return self._prepared

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared events, and split them.

        Raises:
            ValueError: if a split is empty.
        """
        self.prepared = self._prepare()
        if stage == "predict":
            return
        if not hasattr(self, "parts"):
            self.parts = self.split.split(self.prepared.events)
            self.print_line(self.parts.line)
        self.sizes = {"num_items": self.prepared.events.num_items, "max_length": self.max_length}
        if self.example_type != "sequences":
            self.sizes["num_users"] = self.prepared.events.num_users
        settings = [repr(self.split), self.example_type, self.max_length, self.stride]
        self.fingerprint = digest([self.prepared.fingerprint, *settings])

    def train_matrix(self, values: Literal["ones", "ratings"] = "ones") -> SparseMatrix:
        """Return the training events as a matrix of users by items, for non-neural methods.

        Args:
            values: of an event, 1 (`ones`) or its rating (`ratings`, of repeated events the last).

        Raises:
            ValueError: if there are no ratings.
        """
        events, numbers = self.parts.events, self.parts.event_indices("train")
        if values == "ratings" and events.ratings is None:
            raise ValueError("the data have no ratings; set --data.rating_column")
        width = events.num_items + 1
        starts, stops = self.parts.bounds("train")
        users = np.repeat(np.arange(events.num_users), stops - starts)
        cells = users * width + events.items[numbers]
        order = np.argsort(cells, kind="stable")
        last = np.flatnonzero(np.diff(cells[order], append=-1))  # of each pair
        order = order[last]
        counts = np.bincount(users[order], minlength=events.num_users)
        ratings = None if values == "ones" else events.ratings
        return SparseMatrix(
            np.concatenate([[0], np.cumsum(counts)]),
            np.asarray(events.items[numbers[order]]),
            np.ones(len(order), np.float32) if ratings is None else np.asarray(ratings[numbers[order]]),
            (events.num_users, width),
        )

    def mean_rating(self) -> float:
        """Mean rating of the training events.

        Raises:
            ValueError: if there are no ratings.
        """
        if self.parts.events.ratings is None:
            raise ValueError("the data have no ratings; set --data.rating_column")
        return float(np.mean(self.parts.events.ratings[self.parts.event_indices("train")], dtype=np.float64))

    def median_gap(self) -> int | None:
        """Median of the seconds between two consecutive training events of a user, over all users; None without times."""
        events, (starts, stops) = self.parts.events, self.parts.bounds("train")
        later = ranges(np.minimum(starts + 1, stops), stops)
        if events.times is None or not len(later):
            return None
        return int(np.median(events.times[later] - events.times[later - 1]))

    def item_counts(self) -> np.ndarray:
        """Number of training events of each item, [I + 1] int64."""
        events = self.parts.events
        return np.bincount(events.items[self.parts.event_indices("train")], minlength=events.num_items + 1)

    def report_repeats(self, seen: str) -> None:
        """Print the number of targets that a user has more than once or in the history, if there are any.

        Args:
            seen: the task's rule for items of the history.
        """
        if self.filters.keep_duplicates != "all":
            return
        rule = {
            "mask": "counted as misses, as lists exclude them",
            "keep": "ranked like others, as lists may contain them",
            "drop_targets": "not evaluated",
        }[seen]
        found = {split: self.parts.repeats(split) for split in self.split.requested}
        counts = {split: (again, before) for split, (_, again, before) in found.items()}
        for split, (different, _, before) in found.items():
            if seen == "drop_targets" and before == different:
                raise ValueError(
                    f"--model.seen drop_targets leaves no target in {split}: all {before:,} are in their user's history; set"
                    " it to mask or keep"
                )
        if any(map(any, counts.values())):
            shown = "; ".join(f"{split}: {again:,} and {before:,}" for split, (again, before) in counts.items())
            self.print_line(
                f"targets that repeat an earlier one of the same split (counted once), and others that are in the user's"
                f" history ({rule}; --model.seen {seen}): {shown}"
            )

    def make_dataset(self, split: str) -> Dataset[Any]:
        """Return training samples, or histories to evaluate; of `all`, all users with all their events, without targets.

        Raises:
            ValueError: for `all`, if the task has none of the items.
        """
        if split == "all":
            events = self._events_for(self._task_item_ids())
            ends = events.offsets[1:]
            return HistoryDataset(events, np.arange(events.num_users), ends, ends, self.max_length)
        if split != "train":
            return self.histories(split)
        if self.example_type == "sequences":
            return SequenceDataset(self.parts, self.max_length, self.stride, self.seed)
        return (PairDataset if self.example_type == "pairs" else UserDataset)(self.parts, self.seed)

    def has_validation(self) -> bool:
        return "val" in self.split.requested

    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """Return a loader of all users with all their events, without targets."""
        return self.evaluation_loader("all")

    def _events_for(self, item_ids: list[int] | list[str] | None) -> Interactions:
        """Return all events, with the item numbers of a task with these ids; events of other items are excluded."""
        prepared = self._prepare()
        if item_ids is None or prepared.items.equals(item_ids):
            return prepared.events
        numbers = prepared.items.map_to(item_ids)
        events = prepared.events.renumbered(numbers, len(item_ids))
        if len(events) == 0:
            raise ValueError(f"--data.path {self.path}: the task was trained on none of these items")
        if num_unknown := int(np.count_nonzero(numbers[1:] == 0)):
            num_events = len(prepared.events)
            self.print_line(
                f"excluded {num_events - len(events):,} of {num_events:,} events: those of {num_unknown:,} items that the"
                " task was not trained on"
            )
        return events

    def user(self, user_id: int | str, item_ids: list[int] | list[str] | None = None) -> EvalBatch:
        """Return one user with all events, to recommend to. Does not require `setup`.

        Args:
            user_id: as in the data.
            item_ids: ids of the task's items, in the order of its numbers; None: those of these data.

        Raises:
            ValueError: if there is no such user, or the task has none of the items.
        """
        events, users = self._events_for(item_ids), self._prepare().users.numbers([user_id])
        ends = events.offsets[1:]
        return HistoryDataset(events, users, ends, ends, self.max_length).__getitems__([0])

    def histories(self, split: str) -> HistoryDataset:
        """Return the users who are evaluated in a split (val, test), with their histories and targets.

        Raises:
            ValueError: if there is no such split, or the task was trained on other items.
        """
        item_ids = self._task_item_ids()
        if item_ids is not None and not self.prepared.items.equals(item_ids):
            raise ValueError(
                f"--data.path {self.path} with --data.filters has other items than the training data of the task: it can"
                " predict for such data, but not be evaluated on them"
            )
        if split not in self.split.requested:
            raise ValueError(f"there is no {split} split: set --data.split.{split} to a share")
        users = self.parts.users_to_evaluate(split)
        return HistoryDataset(self.parts.events, users, *self.parts.bounds(split), self.max_length)

    def _task_item_ids(self) -> list[int] | list[str] | None:
        """Ids of the task's items, if it has them."""
        ids: list[int] | list[str] | None = getattr(getattr(self.trainer, "lightning_module", None), "item_ids", None)
        return ids
