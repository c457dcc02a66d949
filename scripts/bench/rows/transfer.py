"""Training a pretrained encoder, and a head on it."""

from __future__ import annotations

from bench.common import BIGMODEL
from bench.rows.row import PYTHON, Bound, Row


def transfer(steps: int, warmup: int, probe_steps: int) -> Row:
    """Training speed of a pretrained encoder of texts; and of a head on it, its features computed before the first step."""
    fit = (
        "fit -c experiments/transfer_learning/minilm_text.yaml --runs_dir .bench/runs --data.cache_dir .bench/cache"
        " --data.max_length 64 --trainer.max_epochs null --trainer.limit_val_batches 0 --callbacks.best null"
        f" --callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {warmup} --callbacks.timer.per_step 32"
    )
    probe = f"{fit} --model.method linear_probe --trainer.max_steps {probe_steps}"
    flags = ["--steps", str(steps), "--warmup", str(warmup)]
    return Row(
        "transfer",
        "Fine-tuning MiniLM (22.6 M) on reviews of at most 64 tokens, batch 32, bf16: training, texts/s",
        {
            "bigmodel fit": [BIGMODEL, *fit.split(), "--trainer.max_steps", str(steps)],
            "HF Trainer": [*PYTHON, "bench.transfer_trainer", *flags],
            "linear probe": [BIGMODEL, *probe.split()],
        },
        [Bound("bigmodel fit", "HF Trainer", "at least", 1.0), Bound("linear probe", "bigmodel fit", "at least", 20)],
    )
