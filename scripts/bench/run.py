"""bigmodel beside plain PyTorch loops, HF Trainer, litgpt, RecBole and RecTools, on this machine: what `make bench` runs.

Each row has several ways of doing the same work. They are run in turns, each in a process of its own on a terminal of its
own (A, B, C, A, B, C, ...), since a machine drifts; ratios are taken within a round, and the median ratio is held against
the bound. Takes about 40 minutes on two cores, which should have nothing else to do.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import BENCH, BIGMODEL, IMAGE_SIZES, SIZES, fit_gpt, last_figure, run_in_terminal, write_text
from bench.recommendation import TARGET, write_events

# What wants other versions than bigmodel does, in an environment of its own, with this one's torch.
OTHERS = {
    "litgpt": ["litgpt==0.5.13", "lightning", "numpy"],
    "recbole": ["recbole==1.2.1", "numpy==1.26.4", "pandas==2.3.3", "scipy<1.15"],
    "rectools": ["rectools[torch]==0.19.0"],
}
LITGPT, RECBOLE, RECTOOLS = (BENCH / name / "bin/python" for name in OTHERS)
SIGNS = {"at least": ">=", "at most": "<="}


class Bound(NamedTuple):
    """How good a way must be: its median figure, or its ratio to that of another way."""

    way: str
    over: str | None
    direction: Literal["at least", "at most"]
    limit: float


class Row(NamedTuple):
    """One comparison: its ways by name, each a command that prints its figure."""

    name: str
    title: str
    ways: dict[str, list[str]]
    bounds: list[Bound]
    times: int = 1  # --rounds is multiplied by this, for short and noisy ways
    once: bool = False  # not by --rounds, for what does not vary or repeats itself
    optional: bool = False  # only when asked for
    figure: str = r'\{"figure": (.*)\}'  # how a way prints it


def gpt(name: str, size: str, steps: int, warmup: int, limits: tuple[float, float, float]) -> Row:
    """Training speed of a GPT. No validation and no checkpoint falls into the steps that are timed; the first log does
    not either, for it starts W&B: warm-up goes past step 10."""
    s = SIZES[size]
    flags = ["--size", size, "--steps", str(steps), "--warmup", str(warmup)]
    timer = f"--callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {warmup}"
    python = [sys.executable, "-m"]
    return Row(
        name,
        f"GPT of {s.depth} layers, {s.num_heads} heads, width {s.width}, context {s.context_length}, batch"
        f" {s.batch_size}, bf16: training, tokens/s",
        {
            "bigmodel fit": fit_gpt(size, steps, f"{timer} --callbacks.timer.per_step {s.tokens_per_step}"),
            "plain loop": [*python, "bench.gpt_plain", *flags],
            "HF Trainer": [*python, "bench.gpt_trainer", *flags],
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
    one_thread = ["env", "OMP_NUM_THREADS=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return Row(
        name,
        f"GPT of {s.depth} layers, {s.num_heads} heads, width {s.width}, context {s.context_length}, batch"
        f" {s.batch_size}, bf16, on two processes ({name.upper()}): training, tokens/s",
        {
            "bigmodel fit": [
                *one_thread,
                *fit_gpt("large", steps, f"{two} {timer} --callbacks.timer.per_step {s.tokens_per_step}"),
            ],
            "plain loop": [*one_thread, *launch, "-m", "bench.gpt_parallel", *flags],
        },
        [Bound("bigmodel fit", "plain loop", "at least", 0.97)],
    )


def asynchronous_checkpoint(steps: int, warmup: int, every: int) -> Row:
    """What a checkpoint of 38 M parameters, half a gigabyte, costs while a thread writes it. Training has one core, and
    writing another, as there are cores to spare where a GPU trains."""
    save = f"--callbacks.last.asynchronous true --callbacks.last.every_n_steps {every}"
    save += " --callbacks.last.every_n_minutes null --callbacks.writes bench.callbacks.Writes"
    save += f" --callbacks.writes.warmup {warmup} --callbacks.writes.every {every} --callbacks.writes.what"
    ways = {"step while written / step": "ratio", "seconds to copy it": "wait"}
    return Row(
        "checkpoint",
        "An asynchronous checkpoint of a GPT of 38 M parameters, one thread for training: what it adds to the steps",
        {way: ["env", "OMP_NUM_THREADS=1", *fit_gpt("deep", steps, f"{save} {what}")] for way, what in ways.items()},
        [Bound("step while written / step", None, "at most", 1.05)],
    )


def resnet(name: str, steps: int, warmup: int, limits: tuple[float, float]) -> Row:
    """Training speed of a ResNet on decoded pictures, without augmentation."""
    s = IMAGE_SIZES[name]
    flags = ["--size", name, "--steps", str(steps), "--warmup", str(warmup)]
    fit = (
        f"fit -c scripts/bench/images.yaml --experiment bench-{name} --trainer.max_steps {steps}"
        f" --model.net.depth {s.depth} --model.net.widths {json.dumps(s.widths, separators=(',', ':'))}"
        f" --data.size {s.pixels} --data.channels {s.channels} --data.batch_size {s.batch_size}"
        f" --callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {warmup}"
        f" --callbacks.timer.per_step {s.batch_size}"
    )
    python = [sys.executable, "-m"]
    return Row(
        name,
        f"ResNet-{s.depth} of widths {s.widths}, {s.pixels}x{s.pixels}x{s.channels}, batch {s.batch_size}, bf16,"
        " channels_last: training, images/s",
        {
            "bigmodel fit": [BIGMODEL, *fit.split()],
            "plain loop": [*python, "bench.image_plain", *flags],
            "HF Trainer": [*python, "bench.image_trainer", *flags],
        },
        [
            Bound("bigmodel fit", over, "at least", limit)
            for over, limit in zip(("plain loop", "HF Trainer"), limits, strict=True)
        ],
        times=3 if name == "resnet_small" else 1,
    )


def jpeg(width: int, height: int) -> Row:
    """How fast a folder of JPEG files is read, over as many processes as there are cores."""
    command = [sys.executable, "-m", "bench.jpeg"]
    flags = ["--width", str(width), "--height", str(height), "--processes", str(os.cpu_count() or 1)]
    return Row(
        f"jpeg{width}",
        f"Reading JPEG files of {width}x{height} as 224x224, {flags[-1]} processes: images/s",
        {"bigmodel": [*command, "bigmodel", *flags], "Pillow": [*command, "pillow", *flags]},
        [Bound("bigmodel", "Pillow", "at least", 0.9)],
    )


def fixed_cost(steps: int, warmup: int) -> Row:
    """What a step costs when the model costs nothing."""
    one_thread = ["env", "OMP_NUM_THREADS=1"]
    others = [*one_thread, sys.executable, "-m", "bench.two_numbers_others"]
    flags = ["--steps", str(steps), "--warmup", str(warmup)]
    fit = f"fit -c scripts/bench/two_numbers.yaml --trainer.max_steps {steps} --callbacks.timer bench.callbacks.Timer"
    return Row(
        "step",
        "A model of two numbers, one thread: ms per optimizer step",
        {
            "bigmodel fit": [*one_thread, BIGMODEL, *fit.split(), "--callbacks.timer.warmup", str(warmup)],
            "bare Lightning": [*others, "lightning", *flags],
            "HF Trainer": [*others, "trainer", *flags],
            "plain loop": [*others, "plain", *flags],
        },
        [Bound("bigmodel fit", None, "at most", 1.5)],
    )


def recommendation(quick: bool) -> list[Row]:
    """SASRec beside RecBole and RecTools on one thread. Seconds are a process's own, which other processes lengthen less."""
    one_thread = ["env", "OMP_NUM_THREADS=1"]
    fit = [*one_thread, BIGMODEL, "fit", "-c", "scripts/bench/recommendation.yaml"]
    recbole = [*one_thread, str(RECBOLE), "-m", "bench.recommendation_recbole"]
    rectools = [*one_thread, str(RECTOOLS), "-m", "bench.recommendation_rectools"]
    reach = (
        f"--callbacks.reach bench.callbacks.Reach --callbacks.reach.metric val/ndcg@10 --callbacks.reach.file {TARGET}"
    )
    steps = "--trainer.max_epochs null --trainer.max_steps 70 --trainer.check_val_every_n_epoch null"
    steps += (
        " --trainer.val_check_interval 1000000 --callbacks.timer bench.callbacks.Predicted --callbacks.timer.warmup 12"
    )
    what = "SASRec of 2 layers, 2 heads, width 64, window 50, full softmax, MovieLens, one thread"
    return [
        Row(
            "recommendation",
            f"{what}: seconds until RecBole's best validation NDCG@10",
            {"RecBole": [*recbole, "--epochs", "1" if quick else "5"], "bigmodel fit": [*fit, *reach.split()]},
            [Bound("RecBole", "bigmodel fit", "at least", 10)],
            once=True,
        ),
        Row(
            "recommendation_epoch",
            f"{what}: training, next items predicted/s",
            {"bigmodel fit": [*fit, *steps.split()], "RecTools": [*rectools, "--epochs", "4"]},
            [Bound("bigmodel fit", "RecTools", "at least", 1)],
        ),
        Row(
            "recommendation_rank",
            f"{what}: seconds to rank all films for each of 671 users, and measure",
            {
                "bigmodel": [*one_thread, sys.executable, "-m", "bench.recommendation"],
                "RecBole": recbole,
                "RecTools": rectools,
            },
            [Bound("RecBole", "bigmodel", "at least", 10), Bound("RecTools", "bigmodel", "at least", 2)],
        ),
        Row(
            "scale",
            "SASRec of width 64 with a million items: peak resident memory of training and ranking, MB",
            {"bigmodel fit": [sys.executable, "-m", "bench.recommendation_scale"]},
            [Bound("bigmodel fit", None, "at most", 2600)],
            once=True,
            optional=True,
        ),
    ]


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
            "HF Trainer": [sys.executable, "-m", "bench.transfer_trainer", *flags],
            "linear probe": [BIGMODEL, *probe.split()],
        },
        [Bound("bigmodel fit", "HF Trainer", "at least", 1.0), Bound("linear probe", "bigmodel fit", "at least", 20)],
    )


def distillation(steps: int, warmup: int) -> Row:
    """What a teacher costs the step of a small ResNet, kept and asked."""
    ways = {"plain step": "plain", "teacher kept": "kept", "forward + step": "apart", "teacher asked": "asked"}
    command, flags = [sys.executable, "-m", "bench.distillation"], ["--steps", str(steps), "--warmup", str(warmup)]
    return Row(
        "distillation",
        "A small ResNet taught by one four times as wide, 28x28, batch 64, bf16: ms per optimizer step",
        {name: [*command, way, *flags] for name, way in ways.items()},
        [
            Bound("teacher kept", "plain step", "at most", 1.05),
            Bound("teacher asked", "forward + step", "at most", 1.05),
        ],
        times=3,
    )


def rows(quick: bool) -> list[Row]:
    """All there is to compare. To add a row, add it here."""
    module, single = [sys.executable, "-m"], "bigmodel"
    loss = [*module, "bench.same_loss", "--steps", "10" if quick else "50"]
    prepare = [sys.executable, "scripts/bench/prepare.py"]
    return [
        gpt("large", "large", *((14, 11) if quick else (31, 11)), limits=(0.98, 1.25, 1.1)),
        gpt("small", "small", *((60, 20) if quick else (700, 100)), limits=(0.93, 1.8, 1.6)),
        parallel("ddp", "ddp", [], *((14, 11) if quick else (31, 11))),
        parallel("fsdp", "fsdp", ["--sharded"], *((14, 11) if quick else (31, 11))),
        asynchronous_checkpoint(*((24, 4, 8) if quick else (100, 10, 20))),
        resnet("resnet_small", *((40, 20) if quick else (400, 60)), limits=(0.93, 1.3)),
        resnet("resnet18", *((14, 11) if quick else (41, 11)), limits=(0.98, 1.1)),
        transfer(*((14, 11, 100) if quick else (41, 11, 600))),
        Row(
            "mnist5k",
            "mnist5k.yaml, three seeds, each under two minutes: mean test accuracy",
            {single: [*module, "bench.mnist5k"]},
            [Bound(single, None, "at least", 0.985)],
            once=True,
        ),
        distillation(*((40, 20) if quick else (300, 60))),
        jpeg(500, 375),
        jpeg(224, 224),
        fixed_cost(*((600, 200) if quick else (5000, 1000))),
        Row(
            "loss",
            f"The same GPT (small) in float32: largest difference from the plain loop's loss over {loss[-1]} steps, nats",
            {single: loss},
            [Bound(single, None, "at most", 1e-4)],
            once=True,
        ),
        Row(
            "generate",
            "Greedy generation of 256 tokens within a context of 512: how many times faster with the cache",
            {single: [*module, "bench.generation"]},
            [Bound(single, None, "at least", 3)],
            once=True,
        ),
        Row(
            "memory",
            "Peak resident memory of fit, children included: on 1 GB of text minus on 10 MB, MB",
            {single: [*module, "bench.memory"]},
            [Bound(single, None, "at most", 200)],
            once=True,
            optional=True,
        ),
        Row(
            "prepare",
            "Time to prepare text, over that of tokenizers' encode_batch on the same text and cores: ratio",
            {single: prepare},
            [Bound(single, None, "at most", 1.1)],
            once=True,
            optional=True,
            figure=r"median ratio ([\d.]+)",
        ),
        *recommendation(quick),
    ]


def install(name: str) -> None:
    """Make the environment of `OTHERS`, unless it is there; packages without a version have that of this environment."""
    done = BENCH / name / "installed"
    if done.exists():
        return
    print(f"installing {name} into {BENCH / name} ...", flush=True)
    venv.create(BENCH / name, with_pip=True, clear=True)
    versions = {own: importlib.metadata.version(own).partition("+")[0] for own in ("torch", "lightning", "numpy")}
    packages = [f"{package}=={versions[package]}" if package in versions else package for package in OTHERS[name]]
    packages.append(f"torch=={versions['torch']}")
    subprocess.run([BENCH / name / "bin/python", "-m", "pip", "install", "-q", *packages], check=True)
    done.touch()


def measure(row: Row, rounds: int) -> dict[str, list[float]]:
    """Each way's figures, one a round; not a number where it failed."""
    figures: dict[str, list[float]] = {way: [] for way in row.ways}
    print(f"\n{row.title}", flush=True)
    for number in range(1, rounds + 1):
        for way, command in row.ways.items():
            print(f"  round {number} of {rounds}  {way:16}", end="", flush=True)
            try:
                figure = float(last_figure(run_in_terminal(command), row.figure))
                print(f"{_short(figure):>12}", flush=True)
            except (RuntimeError, OSError, IndexError) as error:
                figure = float("nan")
                print(f"failed: {error}", flush=True)
            figures[way].append(figure)
    return figures


def show(row: Row, figures: dict[str, list[float]]) -> bool:
    """Print a row's table; whether all its bounds hold."""
    print(f"\n{row.title}\n  {'':30}{'median':>12}{'min':>12}{'max':>12}")
    for way, values in figures.items():
        bounds = [bound for bound in row.bounds if bound.way == way and bound.over is None]
        print(f"  {way:30}" + _spread(values) + "".join(map(_verdict, bounds, [values] * len(bounds))))
    ratios = {
        bound: [a / b for a, b in zip(figures[bound.way], figures[bound.over], strict=True)]
        for bound in row.bounds
        if bound.over is not None
    }
    for bound, values in ratios.items():
        print(f"  {f'{bound.way} / {bound.over}':30}{_spread(values)}{_verdict(bound, values)}")
    return all(_holds(bound, ratios.get(bound, figures[bound.way])) for bound in row.bounds)


def _holds(bound: Bound, values: list[float]) -> bool:
    median = statistics.median(values)
    return median >= bound.limit if bound.direction == "at least" else median <= bound.limit


def _verdict(bound: Bound, values: list[float]) -> str:
    return f"   {SIGNS[bound.direction]} {bound.limit:g}  " + ("holds" if _holds(bound, values) else "DOES NOT HOLD")


def _spread(values: list[float]) -> str:
    return "".join(f"{_short(value):>12}" for value in (statistics.median(values), min(values), max(values)))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> str:
    """What the figures depend on."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning", "transformers"))
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores; Python {sys.version.split()[0]}, {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in rows(quick=False)]
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each way is run (default 5; small: 3 times that)"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"only these of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="few steps and one round: to see whether it works")
    parser.add_argument("--memory", action="store_true", help="also peak memory on 1 GB of text (minutes)")
    parser.add_argument("--prepare", action="store_true", help="also the preparation of text (minutes)")
    parser.add_argument("--scale", action="store_true", help="also a recommender with a million items (a minute)")
    parser.add_argument("--all", action="store_true", help="all rows")
    options = parser.parse_args()
    os.chdir(Path(__file__).parents[2])
    wanted = options.only or [
        row.name for row in rows(options.quick) if not row.optional or options.all or getattr(options, row.name)
    ]
    chosen = [row for row in rows(options.quick) if row.name in wanted]
    write_text()
    for name in OTHERS:
        if any(str(BENCH / name / "bin/python") in way for row in chosen for way in row.ways.values()):
            install(name)
    if any(row.name.startswith("recommendation") for row in chosen):
        write_events()
    load = os.getloadavg()[0]
    warning = " (something else is running: do not trust what follows)" if load > 0.5 else ""
    print(f"{machine()}; load {load:.2f}{warning}")
    rounds = 1 if options.quick else options.rounds
    results = [(row, measure(row, 1 if row.once else rounds * row.times)) for row in chosen]
    print(f"\n{'-' * 100}\n{machine()}; load before the first round {load:.2f}{warning}")
    verdicts = [show(row, figures) for row, figures in results]
    print(f"\n{sum(verdicts)} of {len(verdicts)} rows hold all their bounds")
    if any(value != value for _, figures in results for values in figures.values() for value in values):
        sys.exit(1)


if __name__ == "__main__":
    main()
