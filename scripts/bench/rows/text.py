"""Training GPTs and a pretrained encoder, generating, and preparing text."""

from __future__ import annotations

import sys

from bench.common import BIGMODEL, PRECISION, SIZES, fit_gpt
from bench.others import LITGPT
from bench.rows.row import ONE_THREAD, PYTHON, Bound, Row


def text(quick: bool) -> list[Row]:
    """Language models and transfer learning."""
    few = (14, 11) if quick else (31, 11)
    steps = "10" if quick else "50"
    return [
        gpt("large", "large", *few, limits=(0.98, 1.25, 1.1)),
        gpt("small", "small", *((60, 20) if quick else (700, 100)), limits=(0.93, 1.8, 1.6)),
        parallel("ddp", "ddp", [], *few),
        parallel("fsdp", "fsdp", ["--sharded"], *few),
        asynchronous_checkpoint(*((24, 4, 8) if quick else (100, 10, 20))),
        transfer(*((14, 11, 100) if quick else (41, 11, 600))),
        Row(
            "loss",
            f"The same GPT (small) in float32: largest difference from the plain loop's loss over {steps} steps, nats",
            {"bigmodel": [*PYTHON, "bench.same_loss", "--steps", steps]},
            [Bound("bigmodel", None, "at most", 1e-4)],
            once=True,
        ),
        Row(
            "generate",
            "Greedy generation of 256 tokens within a context of 512: how many times faster with the cache",
            {"bigmodel": [*PYTHON, "bench.generation"]},
            [Bound("bigmodel", None, "at least", 3)],
            once=True,
        ),
        Row(
            "memory",
            "Peak resident memory of fit, children included: on 1 GB of text minus on 10 MB, MB",
            {"bigmodel": [*PYTHON, "bench.memory"]},
            [Bound("bigmodel", None, "at most", 200)],
            once=True,
            optional=True,
        ),
        Row(
            "prepare",
            "Time to prepare text, over that of tokenizers' encode_batch on the same text and cores: ratio",
            {"bigmodel": [sys.executable, "scripts/bench/prepare.py"]},
            [Bound("bigmodel", None, "at most", 1.1)],
            once=True,
            optional=True,
            figure=r"median ratio ([\d.]+)",
        ),
    ]


def gpt(name: str, size: str, steps: int, warmup: int, limits: tuple[float, float, float]) -> Row:
    """Training speed of a GPT. No validation and no checkpoint falls into the steps that are timed; the first log does
    not either, for it starts W&B: warm-up goes past step 10."""
    s = SIZES[size]
    flags = ["--size", size, "--steps", str(steps), "--warmup", str(warmup)]
    timer = f"--callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {warmup}"
    return Row(
        name,
        f"GPT of {s.depth} layers, {s.num_heads} heads, width {s.width}, context {s.context_length}, batch"
        f" {s.batch_size}, {PRECISION}: training, tokens/s",
        {
            "bigmodel fit": fit_gpt(size, steps, f"{timer} --callbacks.timer.per_step {s.tokens_per_step}"),
            "plain loop": [*PYTHON, "bench.gpt_plain", *flags],
            "HF Trainer": [*PYTHON, "bench.gpt_trainer", *flags],
            "litgpt": [str(LITGPT), "-m", "bench.gpt_litgpt", *flags],
        },
        [
            Bound("bigmodel fit", over, "at least", limit)
            for over, limit in zip(("plain loop", "HF Trainer", "litgpt"), limits, strict=True)
        ],
        times=3 if size == "small" else 1,
    )


def parallel(name: str, hardware: str, plain_flags: list[str], steps: int, warmup: int) -> Row:
    """Training speed of two processes on one core each. Lightning launches those of bigmodel, torchrun those of the loop."""
    s = SIZES["large"]
    timer = f"--callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {warmup}"
    two = f"-c experiments/hardware/{hardware}.yaml --trainer.accelerator cpu --trainer.devices 2"
    flags = ["--size", "large", "--steps", str(steps), "--warmup", str(warmup), *plain_flags]
    launch = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return Row(
        name,
        f"GPT of {s.depth} layers, {s.num_heads} heads, width {s.width}, context {s.context_length}, batch"
        f" {s.batch_size}, {PRECISION}, on two processes ({name.upper()}): training, tokens/s",
        {
            "bigmodel fit": [
                *ONE_THREAD,
                *fit_gpt("large", steps, f"{two} {timer} --callbacks.timer.per_step {s.tokens_per_step}"),
            ],
            "plain loop": [*ONE_THREAD, *launch, "-m", "bench.gpt_parallel", *flags],
        },
        [Bound("bigmodel fit", "plain loop", "at least", 0.97)],
    )


def asynchronous_checkpoint(steps: int, warmup: int, every: int) -> Row:
    """What a checkpoint of 38 M parameters, half a gigabyte, costs while a thread writes it. Training has one core, and
    writing another, as there are cores to spare where a GPU trains."""
    save = f"--callbacks.last.asynchronous true --callbacks.last.every_n_steps {every}"
    save += " --callbacks.last.every_n_minutes null --callbacks.writes bench.callbacks.SupportsCorpusGeneration"
    save += f" --callbacks.writes.warmup {warmup} --callbacks.writes.every {every} --callbacks.writes.what"
    ways = {"step while written / step": "ratio", "seconds to copy it": "wait"}
    return Row(
        "checkpoint",
        "An asynchronous checkpoint of a GPT of 38 M parameters, one thread for training: what it adds to the steps",
        {way: [*ONE_THREAD, *fit_gpt("deep", steps, f"{save} {what}")] for way, what in ways.items()},
        [Bound("step while written / step", None, "at most", 1.05)],
    )


def transfer(steps: int, warmup: int, probe_steps: int) -> Row:
    """Training speed of a pretrained encoder of texts; and of a head on it, its features computed before the first step."""
    fit = (
        "fit -c experiments/transfer_learning/minilm_text.yaml --runs_dir .bench/runs --data.cache_dir .bench/cache"
        f" --trainer.precision {PRECISION}"
        " --data.max_length 64 --trainer.max_epochs null --trainer.limit_val_batches 0 --callbacks.best null"
        f" --callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {warmup} --callbacks.timer.per_step 32"
    )
    probe = f"{fit} --model.method linear_probe --trainer.max_steps {probe_steps}"
    flags = ["--steps", str(steps), "--warmup", str(warmup)]
    return Row(
        "transfer",
        f"Fine-tuning MiniLM (22.6 M) on reviews of at most 64 tokens, batch 32, {PRECISION}: training, texts/s",
        {
            "bigmodel fit": [BIGMODEL, *fit.split(), "--trainer.max_steps", str(steps)],
            "HF Trainer": [*PYTHON, "bench.transfer_trainer", *flags],
            "linear probe": [BIGMODEL, *probe.split()],
        },
        [Bound("bigmodel fit", "HF Trainer", "at least", 1.0), Bound("linear probe", "bigmodel fit", "at least", 20)],
    )
