"""Ids and titles of items by their numbers; available without the data.

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
from bigmodel.tasks.recommendation.interactions import IdTable
from bigmodel.tasks.recommendation.prepare import PreparedInteractions
from bigmodel.tasks.recommendation.ranking import ScoreBlock, top_k


class ItemCatalog:
    """Ids and titles of items; also ids of users if the data are present.

    Args:
        items: ids of items.
        users: ids of users; None: unknown.
    """

    def __init__(self, items: IdTable, users: IdTable | None = None) -> None:
        self.items, self.users = items, users

    @classmethod
    def of_task(cls, loaded: ItemCatalog | None, data: Any) -> ItemCatalog:
        """Return the catalog of a task: items of its checkpoint (or else of its data), and users of its data.

        Raises:
            ValueError: if it has neither.
        """
        prepared: PreparedInteractions | None = getattr(data, "prepared", None)
        if loaded is None and prepared is None:
            raise ValueError("this task has no ids of its items: load it from a run with bigmodel.load")
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
        are_integers = all(isinstance(one, int) for one in ids)
        titles = self.items.titles(np.arange(1, len(self) + 1))
        return {
            "ids": torch.tensor(ids, dtype=torch.int64) if are_integers else ids,
            "titles": titles if any(titles) else None,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ItemCatalog:
        """Restore the catalog from `state_dict`."""
        ids = state["ids"].tolist() if isinstance(state["ids"], Tensor) else state["ids"]
        columns = {"id": pa.array(ids)}
        if state["titles"] is not None:
            columns["title"] = pa.array(state["titles"], pa.string())
        return cls(IdTable(pa.table(columns), 1, "item"))

    def numbers(self, ids: Sequence[int | str]) -> Tensor:
        """Return the numbers [M] of items.

        Raises:
            ValueError: for an id that is not in the data.
        """
        return torch.from_numpy(self.items.numbers(ids))

    def recommend(self, score_block: ScoreBlock, k: int, excluded: Tensor) -> list[dict[str, Any]]:
        """Return the best k items for one user, without those `excluded` [1, H], each with `item`, `title` and `score`.

        Raises:
            ValueError: for an invalid k.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"--k {k}: must be in 1 to {len(self):,}, the number of items")
        items, scores = top_k(score_block, len(self), k, excluded)
        listed = items[0] > 0  # the list is shorter if all other items are excluded
        numbers = items[0][listed].cpu().numpy()
        rows = zip(self.items.ids(numbers), self.items.titles(numbers), scores[0][listed].tolist(), strict=True)
        return [{"item": one, "title": title, "score": score} for one, title, score in rows]

    def prediction_table(self, score_block: ScoreBlock, batch: EvalBatch, k: int, excluded: Tensor) -> dict[str, Any]:
        """Return a row for each user of a batch: `user`, and the lists `items`, `scores` and, if the data have them,
        `titles`.

        Lists have k items, or all if there are fewer, without those `excluded` [B, H].
        """
        assert self.users is not None
        items, scores = top_k(score_block, len(self), min(k, len(self)), excluded)
        real = batch.weight > 0
        items, scores = items[real].cpu(), scores[real].cpu()
        listed = items > 0  # lists are shorter if all other items are excluded
        numbers = items[listed].numpy()
        ends = pa.array(np.concatenate([[0], listed.sum(1).cumsum(0).numpy()]), pa.int32())
        columns: dict[str, Any] = {
            "user": pa.array(self.users.ids(batch.users[real].cpu().numpy())),
            "items": pa.ListArray.from_arrays(ends, pa.array(self.items.ids(numbers))),
            "scores": pa.ListArray.from_arrays(ends, pa.array(scores[listed].numpy())),
        }
        titles = self.items.titles(numbers)
        if any(titles):
            columns["titles"] = pa.ListArray.from_arrays(ends, pa.array(titles, pa.string()))
        return columns
