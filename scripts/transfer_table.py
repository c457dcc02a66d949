"""Accuracy of each fine-tuning method by the number of labels: a table, and a plot.

Runs `bigmodel fit` and `bigmodel test` for each method, number of labels per class and seed, one after another in this
process, and saves the results in .bench/; saved results are not run again. Without validation, as few labels leave none.

    text      experiments/transfer_learning/minilm_text.yaml, 64 tokens: reviews of food, by a sentence encoder
    digits    experiments/transfer_learning/own_run.yaml: the digits 5 to 9, by a net that was trained on 0 to 4
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt

from bigmodel.cli import main as bigmodel

BENCH = Path(".bench")
MEASURED = ("method", "labels", "seed", "accuracy", "seconds")


class Table(NamedTuple):
    """One comparison: an experiment, the optimizer steps by labels per class, and the flags of each method. Linear probes,
    whose steps are cheap, take 300 steps."""

    experiment: str
    flags: str
    steps: dict[int, int]
    methods: dict[str, str]
    title: str


PROBE = "--model.method linear_probe --model.optimizer.lr 1e-2 --trainer.max_steps 300"
TABLES = {
    "text": Table(
        "minilm_text",
        "--data.max_length 64",
        {16: 20, 64: 30, 1024: 64},
        {
            "scratch": "--model.pretrained false",
            "knn_probe": "--model.method knn_probe",
            "linear_probe": PROBE,
            "gradual": "--model.method gradual --model.optimizer.lr 3e-4",
            "lora": "--model.method lora --model.optimizer.lr 1e-3",
            "full": "",
        },
        "reviews of food",
    ),
    "digits": Table(
        "own_run",
        "",
        {16: 60, 64: 120, 256: 240},
        {
            "scratch": "--model.pretrained false",
            "knn_probe": "--model.method knn_probe",
            "linear_probe": PROBE,
            "gradual": "--model.method gradual",
            "full": "",
        },
        "digits 5 to 9",
    ),
}
COLORS = dict(zip(TABLES["text"].methods, ("0.5", "C0", "C1", "C2", "C3", "C4"), strict=True))


def fit(*flags: str) -> Path:
    """Run `bigmodel fit`; return the directory of the run."""
    run_file = BENCH / f"run-{os.getpid()}"
    os.environ["BIGMODEL_RUN_FILE"] = str(run_file)
    bigmodel(
        ["fit", *flags, "--runs_dir", str(BENCH / "runs"), "--wandb.mode", "disabled", "--callbacks.progress", "null"]
    )
    run = Path(run_file.read_text().strip())
    run_file.unlink()
    return run


def pretrained_digits() -> Path:
    """Return the run that is trained on 0 to 4."""
    run_file = BENCH / "digits_0_4"
    if not run_file.exists():
        experiment = ["-c", "experiments/image_classification/mnist5k.yaml", "--data.classes", '["0","1","2","3","4"]']
        run_file.write_text(str(fit(*experiment)))
    return Path(run_file.read_text())


def measure(table: Table, flags: list[str], method: str, labels: int, seed: int) -> tuple[float, float]:
    """Return the accuracy on the test split, and the duration of the fit in seconds."""
    start = time.perf_counter()
    run = fit(
        "-c", f"experiments/transfer_learning/{table.experiment}.yaml", *flags, "--data.shots", str(labels),
        "--trainer.max_epochs", "null", "--trainer.max_steps", str(table.steps[labels]), *table.methods[method].split(),
        "--seed_everything", str(seed), "--data.seed", str(seed), "--trainer.limit_val_batches", "0",
        "--callbacks.best", "null",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    bigmodel(["test", str(run), "--checkpoint", "last"])
    return json.loads((run / "test.json").read_text())["test/accuracy"], seconds


def read(path: Path) -> dict[tuple[str, int, int], float]:
    """Return the saved results: accuracy by method, labels and seed."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {
            (row["method"], int(row["labels"]), int(row["seed"])): float(row["accuracy"])
            for row in csv.DictReader(file)
        }


def spread(found: dict[tuple[str, int, int], float], method: str, labels: int) -> list[float]:
    """Return the accuracies of all seeds."""
    return [accuracy for (name, number, _), accuracy in found.items() if (name, number) == (method, labels)]


def show(table: Table, found: dict[tuple[str, int, int], float]) -> None:
    """Print the table: mean and standard deviation over seeds, in percent."""
    print(f"\n| {table.title}: labels per class | " + " | ".join(f"{labels:,}" for labels in table.steps) + " |")
    print("|---" * (1 + len(table.steps)) + "|")
    for method in table.methods:
        cells = []
        for labels in table.steps:
            values = [100 * value for value in spread(found, method, labels)]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{deviation}" if values else "not run")
        print(f"| {method} | " + " | ".join(cells) + " |")


def draw(names: list[str], path: Path) -> None:
    """Draw accuracy by labels, a panel for each table, lines through the means and bars of a standard deviation."""
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        table, found = TABLES[name], read(BENCH / f"transfer_{name}.csv")
        for method in table.methods:
            rows = [(labels, values) for labels in table.steps if (values := spread(found, method, labels))]
            means = [statistics.mean(values) for _, values in rows]
            errors = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in rows]
            style = {"color": COLORS[method], "linestyle": "--" if method == "scratch" else "-"}
            axes.errorbar(
                [labels for labels, _ in rows],
                means,
                errors,
                marker="o",
                markersize=4,
                capsize=2,
                label=method,
                **style,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(table.steps), [f"{labels:,}" for labels in table.steps])
        axes.minorticks_off()
        axes.set_xlabel("labels per class")
        axes.set_ylabel("test accuracy")
        axes.set_title(table.title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="tables to run (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--labels", type=int, nargs="+", help="only these numbers of labels per class")
    parser.add_argument("--draw", type=Path, help="file of the plot")
    options = parser.parse_args()
    BENCH.mkdir(exist_ok=True)
    names = options.tables or list(TABLES)
    for name in names:
        table, path = TABLES[name], BENCH / f"transfer_{name}.csv"
        flags = [*table.flags.split(), "--data.cache_dir", str(BENCH / "cache")]
        if name == "digits":
            flags += ["--model.backbone", str(pretrained_digits())]
        for seed in options.seeds:
            for labels in options.labels or table.steps:
                for method in table.methods:
                    if (method, labels, seed) in read(path):
                        continue
                    accuracy, seconds = measure(table, flags, method, labels, seed)
                    new = not path.exists()
                    with open(path, "a", newline="") as file:
                        csv.writer(file).writerows(
                            [MEASURED] * new + [(method, labels, seed, accuracy, round(seconds, 1))]
                        )
        show(table, read(path))
    if options.draw:
        draw(names, options.draw)


if __name__ == "__main__":
    main()
