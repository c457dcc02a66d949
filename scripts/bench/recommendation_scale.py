"""A million items through `bigmodel fit`: seconds and peak resident memory of each phase.

    python -m bench.recommendation_scale [--items 1000000] [--users 200000] [--events 50]

Users choose by Zipf's law, and each item is chosen at least once. A SASRec of width 64 is trained for 50 steps of 128
windows, 50 positions each, by sampled softmax with 256 negatives; then targets of 2,000 users are ranked among all items.
The table has 256 MB in float32; with its gradient and two moments of AdamW it is 1,024 MB. Memory is that of `bench.memory`.
The figure is the peak of the whole run [MB].
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.common import BENCH, BIGMODEL, report
from bench.memory import watch

STEPS, RANKED, BATCH = 50, 2000, 128


def write_events(path: Path, num_users: int, num_events: int, num_items: int) -> None:
    """`num_events` of each user; the k-th most popular item is drawn in proportion to 1 / k."""
    random = np.random.default_rng(0)
    shares = np.cumsum(1 / np.arange(1, num_items + 1))
    items = np.searchsorted(shares, random.random(num_users * num_events) * shares[-1])
    items[random.permutation(len(items))[:num_items]] = np.arange(num_items)
    users, times = np.repeat(np.arange(num_users), num_events), np.tile(np.arange(num_events), num_users)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--events", type=int, default=50, help="of each user")
    options = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH) as folder:
        events, phases = Path(folder, "events.parquet"), Path(folder, "phases.json")
        write_events(events, options.users, options.events, options.items)
        flags = (
            f"--experiment bench-scale --runs_dir {folder}/runs --data.path {events} --data.cache_dir {folder}/cache"
            " --model.loss bigmodel.tasks.recommendation.SampledSoftmax --model.loss.num_negatives 256"
            f" --trainer.max_steps {STEPS} --trainer.max_epochs null --trainer.val_check_interval {STEPS}"
            f" --trainer.check_val_every_n_epoch null --trainer.limit_val_batches {-(-RANKED // BATCH)}"
            f" --data.batch_size {BATCH} --callbacks.phases bench.callbacks.Phases --callbacks.phases.file {phases}"
        )
        seen = watch([BIGMODEL, "fit", "-c", "scripts/bench/recommendation.yaml", *flags.split()], folder)
        ends = {**json.loads(phases.read_text()), "save": seen[-1][0]}
    start = seen[0][0]
    for phase, end in ends.items():
        most = max((size for now, size in seen if start <= now <= end), default=0)
        print(f"{phase:8} {end - start:6.1f} s   peak {most / 1e6:6,.0f} MB resident", flush=True)
        start = end
    report(max(size for _, size in seen) / 1e6)


if __name__ == "__main__":
    main()
