"""Ids and titles of items by number, and back; available without the data.

B users, I items (numbered 1 to I), k length of a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bigmodel.tasks.recommendation.batches import EvalBatch
from bigmodel.tasks.recommendation.interactions import Ids
from bigmodel.tasks.recommendation.prepare import Prepared
from bigmodel.tasks.recommendation.ranking import ScoreBlock, top_k


class ItemCatalog:
    """Ids and titles of items; also ids of users, where the data are present.

    Args:
        items: ids of items.
        users: ids of users; None: unknown.
    """

    def __init__(self, items: Ids, users: Ids | None = None) -> None:
        self.items, self.users = items, users

    @classmethod
    def known_to(cls, loaded: ItemCatalog | None, data: Any) -> ItemCatalog:
        """Return the catalogue of a task: items of its checkpoint, if it was loaded from one, and users of its data.

        Raises:
            ValueError: if it has neither.
        """
        prepared: Prepared | None = getattr(data, "prepared", None)
        if loaded is None and prepared is None:
            raise ValueError("this task does not know what its items are called: load it from a run with bigmodel.load")
        items = loaded.items if loaded is not None else prepared.items  # type: ignore[union-attr]
        return cls(items, prepared.users if prepared is not None else None)

    @property
    def item_ids(self) -> list[int] | list[str]:
        """Ids of the items, in the order of their numbers."""
        return self.items.ids(np.arange(1, len(self) + 1))

    def __len__(self) -> int:
        return len(self.items)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, for a checkpoint."""
        ids = self.item_ids
        whole = all(isinstance(one, int) for one in ids)
        titles = self.items.titles(np.arange(1, len(self) + 1))
        return {
            "ids": torch.tensor(ids, dtype=torch.int64) if whole else ids,
            "titles": titles if any(titles) else None,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ItemCatalog:
        """Restore the catalogue from `state_dict`."""
        ids = state["ids"].tolist() if isinstance(state["ids"], Tensor) else state["ids"]
        columns = {"id": pa.array(ids)}
        if state["titles"] is not None:
            columns["title"] = pa.array(state["titles"], pa.string())
        return cls(Ids(pa.table(columns), 1, "item"))

    def numbers(self, ids: Sequence[int | str]) -> Tensor:
        """Return the numbers [M] of items.

        Raises:
            ValueError: for an id that is not in the data.
        """
        return torch.from_numpy(self.items.numbers(ids))

    def best(self, score_block: ScoreBlock, batch: EvalBatch, k: int) -> list[dict[str, Any]]:
        """Return the best k items of the one user of a batch, each with `item`, `title` (None: the data have none) and
        `score`.

        Raises:
            ValueError: for an invalid k.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"--k {k}: a list has 1 to {len(self):,} items, as many as there are")
        items, scores = top_k(score_block, len(self), k, batch.history)
        there = items[0] > 0  # where all others are in the history, the list is shorter
        numbers = items[0][there].cpu().numpy()
        rows = zip(self.items.ids(numbers), self.items.titles(numbers), scores[0][there].tolist(), strict=True)
        return [{"item": one, "title": title, "score": score} for one, title, score in rows]

    def table(self, score_block: ScoreBlock, batch: EvalBatch, k: int) -> dict[str, Any]:
        """Return a row for each user of a batch: `user`, and the lists `items`, `scores` and, if there are any,
        `titles`.
        """
        assert self.users is not None
        items, scores = top_k(score_block, len(self), k, batch.history)
        real = batch.weight > 0
        items, scores = items[real].cpu(), scores[real].cpu()
        there = items > 0  # where all others are in the history, lists are shorter
        numbers = items[there].numpy()
        ends = pa.array(np.concatenate([[0], there.sum(1).cumsum(0).numpy()]), pa.int32())
        columns: dict[str, Any] = {
            "user": pa.array(self.users.ids(batch.users[real].cpu().numpy())),
            "items": pa.ListArray.from_arrays(ends, pa.array(self.items.ids(numbers))),
            "scores": pa.ListArray.from_arrays(ends, pa.array(scores[there].numpy())),
        }
        titles = self.items.titles(numbers)
        if any(titles):
            columns["titles"] = pa.ListArray.from_arrays(ends, pa.array(titles, pa.string()))
        return columns
