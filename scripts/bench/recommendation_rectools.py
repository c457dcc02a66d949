"""RecTools' SASRec on the same events, split, sizes and loss; in an environment of its own, which has no bigmodel.

It is trained on the last 51 events of each user, where bigmodel takes all of them in windows of 51: what is compared is how
many next items are predicted in a second. To rank is its `recommend` without films seen, and then its metrics.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from pytorch_lightning import Callback, Trainer
from rectools import Columns  # type: ignore[import-not-found]
from rectools.dataset import Dataset  # type: ignore[import-not-found]
from rectools.metrics import MRR, NDCG, HitRate, calc_metrics  # type: ignore[import-not-found]
from rectools.models import SASRecModel  # type: ignore[import-not-found]

from bench.common import report
from bench.recommendation import BATCH, DEPTH, DROPOUT, EVENTS, HEADS, RATE, WIDTH, WINDOW, report_seconds


class Epochs(Callback):
    """The process's own time between the end of the first epoch and that of the last."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        now = time.process_time()
        if trainer.current_epoch == 0:
            self.start = now
        self.seconds = now - self.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1, help="train so many; 1: and rank")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    events = pd.read_csv(EVENTS, sep="\t", names=["user_id", "item_id", "datetime"], skiprows=1)
    events[Columns.Datetime] = pd.to_datetime(events["datetime"], unit="s")
    events[Columns.Weight] = 1.0
    last = events.groupby("user_id").cumcount(ascending=False)
    train, targets = events[last >= 2], events[last == 1]
    clock = Epochs()

    def trainer() -> Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(
            max_epochs=options.epochs, accelerator="cpu", enable_checkpointing=False, callbacks=[clock], **quiet
        )

    model = SASRecModel(
        n_factors=WIDTH, n_blocks=DEPTH, n_heads=HEADS, session_max_len=WINDOW, dropout_rate=DROPOUT, lr=RATE,
        batch_size=BATCH, loss="softmax", get_trainer_func=trainer, recommend_batch_size=128,
        recommend_torch_device="cpu", use_key_padding_mask=True,
    )  # fmt: skip
    dataset = Dataset.construct(train)
    model.fit(dataset)
    if options.epochs > 1:
        predicted = (train.groupby("user_id").size().clip(upper=WINDOW + 1) - 1).sum()
        report(float(predicted * (options.epochs - 1) / model.fit_trainer.callbacks[0].seconds))
        return
    metrics = {"ndcg": NDCG(k=10, divide_by_achievable=True), "hr": HitRate(k=10), "mrr": MRR(k=10)}

    def rank() -> None:
        lists = model.recommend(users=train["user_id"].unique(), dataset=dataset, k=10, filter_viewed=True)
        calc_metrics(metrics, lists, interactions=targets)

    report_seconds(rank)


if __name__ == "__main__":
    main()
