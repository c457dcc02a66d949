"""Compare a teacher, its distilled student, and the same student trained alone.

    python scripts/distillation_report.py RUN --alone RUN

Quality is the metric that `bigmodel test` (or `validate`) wrote into each run; parameters and size are those of the exported
weights; latency is the median time, on this machine's CPU and in float32, from a batch to its logits: of one sample, and of
a batch of the run's size. The table is printed and written to RUN/distillation.md, a plot of quality by latency to
RUN/distillation.png.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
import yaml
from lightning.pytorch import Trainer

from bigmodel import checkpoint, run
from bigmodel.cli import main as bigmodel

RESULTS = {
    "test.json": "test",
    "validate.json": "val",
}  # files and the splits of their metrics; the first that all have
SECONDS, WARMUP = 3.0, 3  # seconds of timing, and rounds before it


class Line(NamedTuple):
    """A line of the table, for one net; latencies in ms."""

    name: str
    quality: float
    parameters: int
    megabytes: float
    one: float
    batch: float


def find_teacher(distilled: Path, named: str | None) -> Path:
    """Return the run of the teacher of a distilled run.

    Args:
        distilled: the run's directory.
        named: run of the teacher; None: the one in the run's configuration.

    Raises:
        ValueError: if the run was not distilled, has several teachers, or the weights are not those of its teacher.
    """
    saved = checkpoint.read(checkpoint.find_checkpoint(distilled), whole=False)["bigmodel"].get("distillation")
    if saved is None:
        raise ValueError(f"{distilled} is not a run of a distillation: set one as RUN")
    paths = yaml.safe_load((distilled / "config.yaml").read_text())["model"]["init_args"]["teacher"]
    if named is None and not isinstance(paths, str):
        if len(paths) != 1:
            raise ValueError(f"{distilled} has {len(paths)} teachers: set one of them as --teacher")
        (paths,) = paths
    teacher = run.find_run(named or paths)
    if checkpoint.content_hash(checkpoint.find_checkpoint(teacher)) not in saved["teachers"]:
        raise ValueError(
            f"{teacher} has weights different from those of the teacher of {distilled}: set another --teacher"
        )
    return teacher


def qualities(runs: list[Path], metric: str | None) -> tuple[str, list[float]]:
    """Return the name of a metric, by default the one that the first run's checkpoint was selected by, and its value in each
    run.

    Raises:
        ValueError: if not all runs were evaluated, or not with this metric.
    """
    for name in RESULTS:
        if all((directory / name).exists() for directory in runs):
            found = [json.loads((directory / name).read_text()) for directory in runs]
            break
    else:
        missing = next(directory for directory in runs if not (directory / "test.json").exists())
        raise ValueError(
            f"{missing} was not evaluated: run `bigmodel test {missing}` first (or `validate`, for all three)"
        )
    if metric is None:
        monitored = json.loads((runs[0] / "run.json").read_text())["best"]["metric"]
        metric = f"{RESULTS[name]}/{monitored.partition('/')[2]}"
    if not all(metric in values for values in found):
        raise ValueError(
            f"--metric {metric} is not in the results of all runs; the first has"
            f" {', '.join(key for key in found[0] if '/' in key)}"
        )
    return metric, [values[metric] for values in found]


def sample(directory: Path, task: Any) -> Any:
    """Return the first batch of a run's validation data, on the CPU."""
    data: Any = run.load_data(directory)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # without its lines on devices
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(task)  # data may need its tokenizer
    data.trainer = trainer
    data.prepare_data()
    data.setup("validate")
    return next(iter(data.val_dataloader()))


@torch.inference_mode()
def latencies(tasks: list[Any], batch: Any) -> list[float]:
    """Return the median milliseconds of each task's logits of a batch, measured in turns because the speed drifts."""
    times: list[list[float]] = [[] for _ in tasks]
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS or len(times[0]) <= 2 * WARMUP:
        for task, found in zip(tasks, times, strict=True):
            begun = time.perf_counter()
            task.logits(task.features(batch))
            found.append(1000 * (time.perf_counter() - begun))
    return [statistics.median(found[WARMUP:]) for found in times]


def exported_megabytes(directory: Path) -> float:
    """Return the size of the weights that `bigmodel export` writes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "weights.safetensors"
        bigmodel(["export", str(directory), "--output", str(file)])
        return file.stat().st_size / 1e6


def table(lines: list[Line], metric: str, rows: int) -> str:
    """Return a table in Markdown."""
    head = f"| | {metric} | parameters | MB on the disk | ms, one sample | ms, {rows} samples |"
    body = [
        f"| {line.name} | {line.quality:.4g} | {line.parameters:,} | {line.megabytes:.3g}"
        f" | {line.one:.3g} | {line.batch:.3g} |"
        for line in lines
    ]
    return "\n".join([head, "|---" * 6 + "|", *body])


def draw(lines: list[Line], metric: str, path: Path) -> None:
    """Plot quality by latency of one sample."""
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for line in lines:
        axes.scatter(line.one, line.quality, color="black")
        axes.annotate(line.name, (line.one, line.quality), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.set_xlabel("latency of one sample [ms]")
    axes.set_ylabel(metric)
    axes.margins(0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run of the distilled student: a directory, `last`, or the end of its name")
    parser.add_argument("--alone", required=True, help="run of the same student without a teacher")
    parser.add_argument("--teacher", help="run of the teacher (default: the one in the configuration of RUN)")
    parser.add_argument(
        "--metric", help="such as test/accuracy (default: the one that the checkpoint of RUN was selected by)"
    )
    options = parser.parse_args(arguments)
    try:
        distilled, alone = run.find_run(options.run), run.find_run(options.alone)
        runs = [find_teacher(distilled, options.teacher), alone, distilled]
        metric, values = qualities([distilled, *runs[:2]], options.metric)
    except ValueError as error:
        raise SystemExit(f"distillation_report.py: {error}") from error
    values = [*values[1:], values[0]]

    tasks = [run.load(directory) for directory in runs]
    batch = sample(distilled, tasks[-1])
    ones = latencies(tasks, type(batch)(*(part[:1] for part in batch)))
    batches = latencies(tasks, batch)
    lines = [
        Line(name, value, sum(p.numel() for p in task.parameters()), exported_megabytes(directory), one, whole)
        for name, value, task, directory, one, whole in zip(
            ("teacher", "student alone", "student distilled"), values, tasks, runs, ones, batches, strict=True
        )
    ]
    shown = table(lines, metric, len(batch.index))
    print(shown)
    (distilled / "distillation.md").write_text(shown + "\n")
    draw(lines, metric, distilled / "distillation.png")
    print(f"\nwritten to {distilled}/distillation.md and distillation.png")


if __name__ == "__main__":
    main()
