"""experiments/image_classification/mnist5k.yaml with three seeds, as a person runs it: mean accuracy on the test split.

Prints the seconds that each `bigmodel fit` took, start-up included.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path

from bench.common import BENCH, BIGMODEL, report, run_in_terminal

SEEDS = (1, 2, 3)
MOST_SECONDS = 120


def main() -> None:
    runs = ["--runs_dir", str(BENCH / "runs")]
    experiment = ["-c", "experiments/image_classification/mnist5k.yaml", "--data.cache_dir", str(BENCH / "cache")]
    accuracies, times = [], []
    for seed in map(str, SEEDS):
        start = time.perf_counter()
        command = [BIGMODEL, "fit", *experiment, *runs, "--seed_everything", seed, "--data.seed", seed]
        output = run_in_terminal(command)
        times.append(time.perf_counter() - start)
        directory, *_ = re.findall(r"run +(\S+/mnist5k/\S+)", output)
        run_in_terminal([BIGMODEL, "test", directory])
        accuracies.append(json.loads((Path(directory) / "test.json").read_text())["test/accuracy"])
        print(f"seed {seed}: {times[-1]:.1f} s, test accuracy {accuracies[-1]:.4f}", flush=True)
    if statistics.mean(times) > MOST_SECONDS:
        raise SystemExit(f"took {statistics.mean(times):.0f} s a run, more than {MOST_SECONDS}")
    report(statistics.mean(accuracies))


if __name__ == "__main__":
    main()
