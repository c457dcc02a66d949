"""Shared code of the rows on recommendation: events of MovieLens as a file.

Run as a module, it is bigmodel's way to rank: the validation that `bigmodel fit` does, of an untrained net, again and again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from bench.common import BENCH, report

EVENTS = BENCH / "movielens.inter"  # RecBole's format: columns apart by tabs, types in the header
TARGET = BENCH / "movielens-target.json"  # RecBole's best validation NDCG@10
WIDTH, DEPTH, HEADS, WINDOW, DROPOUT, RATE, BATCH = 64, 2, 2, 50, 0.2, 1e-3, 40
TIMES = 7


def write_events() -> None:
    """MovieLens as bigmodel sorts it. An event's time is its place in the user's history: nobody finds ties to break."""
    if EVENTS.exists():
        return
    import numpy as np

    events = movielens().parts.events
    users = np.repeat(np.arange(events.num_users), np.diff(events.offsets))
    places = np.arange(len(users)) - events.offsets[users]
    rows = zip(users.tolist(), events.items.tolist(), places.tolist(), strict=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *(f"{u}\t{i}\t{t}" for u, i, t in rows)]
    EVENTS.write_text("\n".join(lines) + "\n")


def movielens():  # type: ignore[no-untyped-def]  # what it returns is imported late: others' environments lack it
    """bigmodel's data module, prepared."""
    from bigmodel.tasks.recommendation import InteractionData

    data = InteractionData("{movielens}", max_length=WINDOW, batch_size=128, cache_dir=str(BENCH / "cache"))
    data.prepare_data()
    data.setup()
    return data


def report_seconds(evaluate: Callable[[], object]) -> None:
    """The median time of an evaluation, after one to warm up."""
    evaluate()
    seconds = []
    for _ in range(TIMES):
        start = time.process_time()
        evaluate()
        seconds.append(time.process_time() - start)
    report(statistics.median(seconds))


def main() -> None:
    import lightning as L

    from bigmodel.nn import SASRec
    from bigmodel.tasks.recommendation import SequentialRecommendation

    def net(num_items: int, max_length: int) -> SASRec:
        return SASRec(num_items, max_length, width=WIDTH, depth=DEPTH, num_heads=HEADS, dropout=DROPOUT)

    task, data = SequentialRecommendation(net, topk=(10,)), movielens()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    report_seconds(lambda: trainer.validate(task, data, verbose=False))


if __name__ == "__main__":
    main()
