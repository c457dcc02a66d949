"""RecBole's SASRec on the same events, split, sizes and loss; in an environment of its own, which has no bigmodel.

Each prefix of a user's history is a row of its own there. For a sequential model, RecBole does not leave out the history
from what it ranks; here it is left out, as in the other ways, by one look-up a batch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config  # type: ignore[import-not-found]
from recbole.data import create_dataset, data_preparation  # type: ignore[import-not-found]
from recbole.model.sequential_recommender import SASRec  # type: ignore[import-not-found]
from recbole.trainer import Trainer  # type: ignore[import-not-found]
from recbole.utils import init_seed  # type: ignore[import-not-found]

from bench.common import BENCH, report
from bench.recommendation import DEPTH, DROPOUT, EVENTS, HEADS, RATE, TARGET, WIDTH, WINDOW, report_seconds


class Unseen(SASRec):  # type: ignore[misc]
    """Scores no film that the user has had."""

    seen: torch.Tensor  # [U, I + 1] bool

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        scores: torch.Tensor = super().full_sort_predict(interaction)
        return scores.masked_fill_(self.seen[interaction["user_id"]], -torch.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=0, help="train so many; 0: only rank")
    options = parser.parse_args()
    events, target = EVENTS.resolve(), TARGET.resolve()
    with tempfile.TemporaryDirectory(dir=BENCH) as folder, contextlib.chdir(folder):  # it writes logs where it is run
        run(events, target, options.epochs)


def run(events: Path, target: Path, epochs: int) -> None:
    """Train for so many epochs, or rank."""
    folder = Path.cwd()
    (folder / "movielens").mkdir()
    (folder / "movielens" / "movielens.inter").symlink_to(events)
    settings = {
        "data_path": str(folder), "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": WINDOW, "hidden_size": WIDTH, "inner_size": WIDTH, "n_layers": DEPTH, "n_heads": HEADS,
        "hidden_act": "relu", "hidden_dropout_prob": DROPOUT, "attn_dropout_prob": DROPOUT, "learning_rate": RATE,
        "loss_type": "CE", "train_neg_sample_args": None, "epochs": epochs, "stopping_step": 3,
        "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
        "metrics": ["NDCG", "Hit", "MRR"], "topk": [10], "valid_metric": "NDCG@10", "use_gpu": False,
        "checkpoint_dir": str(folder), "show_progress": False,
    }  # fmt: skip
    config = Config(model="SASRec", dataset="movielens", config_dict=settings)
    init_seed(0, True)
    dataset = create_dataset(config)
    train, valid, _ = data_preparation(config, dataset)
    model = Unseen(config, train.dataset)
    seen = torch.zeros(dataset.user_num, dataset.item_num, dtype=torch.bool)
    rows = train.dataset.inter_feat  # targets are all training events but each user's first, which is in the lists
    seen[rows["user_id"], rows["item_id"]] = True
    seen[rows["user_id"][:, None].expand_as(rows["item_id_list"]), rows["item_id_list"]] = True
    model.seen = seen
    trainer = Trainer(config, model)
    if not epochs:
        report_seconds(lambda: trainer.evaluate(valid, load_best_model=False))
        return
    start, curve = time.process_time(), []

    def note(epoch: int, score: float) -> None:
        curve.append((time.process_time() - start, score))
        print(f"epoch {epoch + 1}: {curve[-1][0]:.1f} s, NDCG@10 {score:.4f}", flush=True)

    trainer.fit(train, valid, verbose=False, saved=False, callback_fn=note)
    seconds, best = max(curve, key=lambda point: point[1])
    target.write_text(json.dumps(best))
    report(seconds)


if __name__ == "__main__":
    main()
