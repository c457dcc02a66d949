"""Comparison of teacher, student alone, and distilled student.

    python scripts/distillation_report.py RUN --alone RUN

Quality is what `bigmodel test` (or `validate`) wrote into each run; parameters and size are those of the exported weights;
latency is the median time, on this machine's CPU and in float32, from a batch to its logits: of one sample, and of a batch
as the run had it. The table is printed and written to RUN/distillation.md, a plot of quality by latency to
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

MEASURED = {"test.json": "test", "validate.json": "val"}  # the first that all runs have, and the names' split
SECONDS, WARMUP = 3.0, 3  # of timing, and rounds before it


class Line(NamedTuple):
    """One net: its name in the table, and what it is like; latencies in ms."""

    name: str
    quality: float
    parameters: int
    megabytes: float
    one: float
    batch: float


def find_teacher(distilled: Path, named: str | None) -> Path:
    """The teacher of a distilled run, of which the checkpoint says by what it was taught.

    Raises:
        ValueError: if the run was not distilled, had several teachers, or from another teacher.
    """
    kept = checkpoint.read(checkpoint.find_checkpoint(distilled), whole=False)["bigmodel"].get("distillation")
    if kept is None:
        raise ValueError(f"{distilled} was not distilled: name the run of a distillation first")
    paths = yaml.safe_load((distilled / "config.yaml").read_text())["model"]["init_args"]["teacher"]
    if named is None and not isinstance(paths, str):
        if len(paths) != 1:
            raise ValueError(f"{distilled} had {len(paths)} teachers; name the one to be shown by --teacher")
        (paths,) = paths
    teacher = run.find_run(named or paths)
    if checkpoint.content_hash(checkpoint.find_checkpoint(teacher)) not in kept["teachers"]:
        raise ValueError(f"{teacher} has not the weights that taught {distilled}; name the run that did by --teacher")
    return teacher


def qualities(runs: list[Path], metric: str | None) -> tuple[str, list[float]]:
    """A metric's name, by default that by which the first run's checkpoint was chosen, and its value in each run.

    Raises:
        ValueError: if not all runs were measured, or not by this metric.
    """
    for name in MEASURED:
        if all((directory / name).exists() for directory in runs):
            found = [json.loads((directory / name).read_text()) for directory in runs]
            break
    else:
        missing = next(directory for directory in runs if not (directory / "test.json").exists())
        raise ValueError(
            f"{missing} was not measured: run `bigmodel test {missing}` first (or `validate`, for all three)"
        )
    if metric is None:
        monitored = json.loads((runs[0] / "run.json").read_text())["best"]["metric"]
        metric = f"{MEASURED[name]}/{monitored.partition('/')[2]}"
    if not all(metric in values for values in found):
        raise ValueError(
            f"--metric {metric} was not measured in all runs; known are"
            f" {', '.join(key for key in found[0] if '/' in key)}"
        )
    return metric, [values[metric] for values in found]


def sample(directory: Path, task: Any) -> Any:
    """The first batch of a run's validation, as it is before it goes to a device."""
    data: Any = run.load_data(directory)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # what devices there are
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.connect(task)  # data may ask the task, for its tokenizer
    data.trainer = trainer
    data.prepare_data()
    data.setup("validate")
    return next(iter(data.val_dataloader()))


@torch.inference_mode()
def latencies(tasks: list[Any], batch: Any) -> list[float]:
    """Median milliseconds of each task's logits of a batch, measured in turns: a machine drifts."""
    times: list[list[float]] = [[] for _ in tasks]
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS or len(times[0]) <= 2 * WARMUP:
        for task, found in zip(tasks, times, strict=True):
            begun = time.perf_counter()
            task.logits(task.features(batch))
            found.append(1000 * (time.perf_counter() - begun))
    return [statistics.median(found[WARMUP:]) for found in times]


def exported_megabytes(directory: Path) -> float:
    """The size of what `bigmodel export` writes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "weights.safetensors"
        bigmodel(["export", str(directory), "--output", str(file)])
        return file.stat().st_size / 1e6


def table(lines: list[Line], metric: str, rows: int) -> str:
    """In Markdown."""
    head = f"| | {metric} | parameters | MB on the disk | ms, one sample | ms, {rows} samples |"
    body = [
        f"| {line.name} | {line.quality:.4g} | {line.parameters:,} | {line.megabytes:.3g}"
        f" | {line.one:.3g} | {line.batch:.3g} |"
        for line in lines
    ]
    return "\n".join([head, "|---" * 6 + "|", *body])


def draw(lines: list[Line], metric: str, path: Path) -> None:
    """Quality by latency of one sample."""
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
    parser.add_argument("run", help="of the distilled student: a directory, `last`, or the end of its name")
    parser.add_argument("--alone", required=True, help="the run of the same student without a teacher")
    parser.add_argument("--teacher", help="the teacher's run (default: as the distilled run names it)")
    parser.add_argument("--metric", help="such as test/accuracy (default: that by which its checkpoint was chosen)")
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
