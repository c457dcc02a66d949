"""All there is to compare."""

from __future__ import annotations

from bench.common import BIGMODEL
from bench.rows.images import images
from bench.rows.recommendation import recommendation
from bench.rows.row import ONE_THREAD, PYTHON, Bound, Row
from bench.rows.text import text


def rows(quick: bool) -> list[Row]:
    """All rows. To add one, add it to its subject's."""
    return [
        *text(quick),
        *images(quick),
        fixed_cost(*((600, 200) if quick else (5000, 1000))),
        *recommendation(quick),
    ]


def fixed_cost(steps: int, warmup: int) -> Row:
    """Cost of a step of a model of two numbers."""
    others = [*ONE_THREAD, *PYTHON, "bench.two_numbers_others"]
    flags = ["--steps", str(steps), "--warmup", str(warmup)]
    fit = f"fit -c scripts/bench/two_numbers.yaml --trainer.max_steps {steps} --callbacks.timer bench.callbacks.Timer"
    return Row(
        "step",
        "A model of two numbers, one thread: ms per optimizer step",
        {
            "bigmodel fit": [*ONE_THREAD, BIGMODEL, *fit.split(), "--callbacks.timer.warmup", str(warmup)],
            "bare Lightning": [*others, "lightning", *flags],
            "HF Trainer": [*others, "trainer", *flags],
            "plain loop": [*others, "plain", *flags],
        },
        [Bound("bigmodel fit", None, "at most", 1.5)],
    )
