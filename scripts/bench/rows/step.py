"""The fixed cost of an optimizer step."""

from __future__ import annotations

from bench.common import BIGMODEL
from bench.rows.row import ONE_THREAD, PYTHON, Bound, Row


def fixed_cost(steps: int, warmup: int) -> Row:
    """What a step costs when the model costs nothing."""
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
