"""`make demo`: train a small language model on Python's own source, and show what it learned.

A few steps of experiments/language_modeling/stdlib.yaml are timed first. The run then takes as many of its 1,500 steps as
fit into three minutes on this machine, with a schedule of that length. At the end it prints bits per byte on the validation
split beside what gzip and xz need for the same text, and a sample of the model's. Further flags go to the fit.
"""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bigmodel.cli import main
from bigmodel.cli.check import run_check

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "language_modeling" / "stdlib.yaml"
PROMPT = "import os\nimport sys\n\n\ndef main(argv=None):\n"
STEPS, VALIDATIONS, WARMUP_STEPS = 1500, 5, 50  # of the experiment
SECONDS = 165.0  # for training, validations included
LONGEST = "00:00:03:00"  # of training, should the machine become slower meanwhile
# Bits per byte on the validation split at the end of a run of so many steps, measured in bf16 with the experiment and the
# flags below.
EXPECTED = {20: 3.09, 50: 3.01, 100: 2.83, 200: 2.51, 400: 2.08, 1020: 1.81, 1500: 1.68}


class Plan(NamedTuple):
    """How long the run is.

    Attributes:
        steps: optimizer steps.
        val_check_interval: optimizer steps from one validation to the next; the last step ends with one.
        warmup_steps: of the schedule.
        val_share: of the validation split that is looked at, above 0 and at most 1.
    """

    steps: int
    val_check_interval: int
    warmup_steps: int
    val_share: float


def plan(step_seconds: float, validation_seconds: float) -> Plan:
    """The experiment, or what of it this machine can do in `SECONDS`: a fifth of them at most for validations."""
    share = min(1.0, SECONDS / 5 / validation_seconds) if validation_seconds else 1.0
    validations = max(1, min(VALIDATIONS, int(SECONDS / 5 / (validation_seconds or 1))))
    left = SECONDS - validations * share * validation_seconds
    steps = max(validations, min(STEPS, int(left / step_seconds)))
    interval = steps // validations
    steps = interval * validations
    return Plan(steps, interval, max(1, min(WARMUP_STEPS, steps // 10)), share)


def expected(steps: int) -> float:
    """Bits per byte after so many steps, between the measured points by the logarithm of the steps."""
    return float(np.interp(np.log(steps), np.log(list(EXPECTED)), list(EXPECTED.values())))


def report(run: Path, val_share: float) -> None:
    """Print the model's bits per byte beside the compressors', and a sample."""
    import bigmodel

    data = bigmodel.load_data(run)
    data.setup("fit")
    text = "".join(data.split_text("val")).encode()
    text = text[: round(val_share * len(text))]
    with open(run / "metrics.csv", newline="") as file:
        reached = [row["val/bits_per_byte"] for row in csv.DictReader(file) if row["val/bits_per_byte"]]
    figures = {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
        "this model": min(map(float, reached)),
    }
    print(f"\nbits per byte on the validation split ({len(text) / 1e6:.2f} MB; fewer is better)")
    for name, bits in figures.items():
        print(f"  {name:12} {bits:6.3f}  {'#' * round(bits * 20)}")
    print("\na sample, from the prompt in its first lines (temperature 0.6)\n")
    main(["generate", str(run), "--prompt", PROMPT, "--max_new_tokens", "200", "--temperature", "0.6", "--seed", "3"])
    print(f"\nthe run is in {run}\n  bigmodel generate {run} --prompt 'import '\n  bigmodel fit --resume {run}")


if __name__ == "__main__":
    flags = ["-c", str(EXPERIMENT), *sys.argv[1:]]
    print("timing a few steps: bigmodel check -c experiments/language_modeling/stdlib.yaml", flush=True)
    measured = run_check(flags)
    assert measured is not None
    assert measured.step_seconds is not None
    length = plan(measured.step_seconds, measured.validation_seconds)
    print(
        f"\ntraining for {length.steps:,} of the experiment's {STEPS:,} steps, as many as fit into three minutes here;"
        f"\nexpect about {expected(length.steps):.2f} bits per byte\n",
        flush=True,
    )
    length_flags = [
        f"--trainer.max_steps={length.steps}",
        f"--trainer.val_check_interval={length.val_check_interval}",
        f"--trainer.limit_val_batches={length.val_share}",
        f"--model.schedule.warmup_steps={length.warmup_steps}",
        f"--trainer.max_time={LONGEST}",
    ]
    main(["fit", "-c", str(EXPERIMENT), *length_flags, *sys.argv[1:]])
    from bigmodel.run import find_run

    newest = find_run("last")
    taken = json.loads((newest / "run.json").read_text())["step"]
    if taken < length.steps:
        print(f"\nthe machine became slower: training ended after three minutes, at step {taken:,} of {length.steps:,}")
    report(newest, length.val_share)
