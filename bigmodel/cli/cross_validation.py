"""`bigmodel fit --data.folds K`: cross-validation, with one fit per fold in sequence, and a report.

Each fit is a separate process with `--data.fold i`, and writes a run directory like any other::

    runs/<experiment>/<time>-<id>/folds.json             the arguments, the number of folds, and the run of `last`
                                  fold-0/, fold-1/, ...   run directories
                                  folds.md, folds.csv    at the end: each fold's best metrics, mean and standard deviation
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bigmodel.checkpoint import checkpoint_step
from bigmodel.data.text import print_text
from bigmodel.run import find_run, new_directory
from bigmodel.run.config import Config

_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def num_folds(config: Config) -> int | None:
    """Return the number of fits; None: one, as usual.

    Raises:
        ValueError: for an invalid number of folds, or several processes, each of which would start its own fits.
    """
    data = config.get("data") or {}
    options = data.get("init_args") or {}
    folds = options.get("folds")
    if folds is None or options.get("fold") is not None:
        return None
    if not isinstance(folds, int) or folds < 2:
        raise ValueError(f"--data.folds {folds} must be at least 2: the samples are divided into as many parts")
    if max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_NTASKS")) > 1:
        raise ValueError(
            f"--data.folds {folds}: a launcher has started several processes, and each would fit all folds; launch"
            " one fold after another, with --data.fold 0 and so on"
        )
    return folds


def find_folds(source: str, runs_dir: str) -> Path | None:
    """Return the directory of a cross-validation, from its path or the end of its name; None if missing or ambiguous."""
    if (Path(source) / "folds.json").is_file():
        return Path(source)
    found = [path.parent for path in Path(runs_dir).glob("**/folds.json") if str(path.parent).endswith(source)]
    return found[0] if len(found) == 1 else None


def run_folds(argv: list[str], folds: int, experiment: str, runs_dir: str) -> None:
    """Fit all folds and report; `argv` are the arguments after `bigmodel fit`.

    Raises:
        SystemExit: with the exit status of the fold that did not finish.
    """
    last = None
    with contextlib.suppress(ValueError):  # there is no run yet
        last = str(find_run("last", runs_dir))
    directory = new_directory(runs_dir, experiment)
    state = {"folds": folds, "arguments": argv, "last": last}
    (directory / "folds.json").write_text(json.dumps(state, indent=2) + "\n")
    _fit_remaining(directory, argv, [])


def resume_folds(directory: Path, more: list[str]) -> None:
    """Fit the unfinished folds of a cross-validation, and report; `more` are flags on top of the original arguments.

    Raises:
        SystemExit: with the exit status of the fold that did not finish.
    """
    _fit_remaining(directory, json.loads((directory / "folds.json").read_text())["arguments"], more)


def _fit_remaining(directory: Path, argv: list[str], more: list[str]) -> None:
    state = json.loads((directory / "folds.json").read_text())
    folds, last = state["folds"], state.get("last")
    if file := os.environ.get("BIGMODEL_RUN_FILE"):
        Path(file).write_text(f"{directory.resolve()}\n")
    for number in range(folds):
        run = directory / f"fold-{number}"
        if _status(run) == "finished":
            continue
        if any(run.glob("checkpoints/*.ckpt")):
            arguments = ["--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)  # stopped before its first checkpoint
            arguments = [*argv, f"--data.fold={number}"]
        print_text(f"fold       {number} of {folds}", flush=True)
        code = _fit([*arguments, *more], run, last)
        if code:
            if not any(directory.glob("fold-*/run.json")):  # an error before it began
                shutil.rmtree(directory)
            else:
                print_text(f"stopped in fold {number}; `bigmodel fit --resume {directory}` resumes it", flush=True)
            sys.exit(code)
    _report(directory, folds)


def _status(run: Path) -> str | None:
    record = run / "run.json"
    return json.loads(record.read_text())["status"] if record.exists() else None


def _fit(arguments: list[str], run: Path, last: str | None) -> int:
    """Run `bigmodel fit` in a separate process; return its exit status, which is not 0 if it was interrupted.

    Ctrl-C reaches that process from the terminal; other signals are forwarded to it.

    Args:
        arguments: after `bigmodel fit`.
        run: its run directory.
        last: the run of `last` before the first fold: otherwise a fold's teacher would be the previous fold.
    """
    environment = {**os.environ, "BIGMODEL_RUN_DIRECTORY": str(run)}
    environment |= {"BIGMODEL_LAST": last} if last is not None else {}
    environment.pop("BIGMODEL_RUN_FILE", None)  # names the directory of all folds
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        if process is not None and number in _FORWARDED_SIGNALS:
            process.send_signal(number)

    handlers = {number: signal.signal(number, receive) for number in (*_FORWARDED_SIGNALS, signal.SIGINT)}
    try:
        process = subprocess.Popen([sys.executable, "-m", "bigmodel", "fit", *arguments], env=environment)
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:  # possibly in its last step, so that it finished
        return code or (130 if signal.SIGINT in received else 85)
    return code if code >= 0 else 128 - code


def _report(directory: Path, folds: int) -> None:
    """Print and write each fold's metrics at its best checkpoint, their mean and standard deviation."""
    found = [_best(directory / f"fold-{number}") for number in range(folds)]
    names = [name for name in found[0] if all(name in values for values in found)]
    head = ["metric", *(f"fold-{number}" for number in range(folds)), "mean", "std"]
    table: list[list[Any]] = []
    for name in names:
        values = [one[name] for one in found]
        table.append([name, *values, statistics.mean(values), statistics.stdev(values)])
    with open(directory / "folds.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *table])
    cells: list[list[str]] = [head, *([row[0], *(f"{value:.4g}" for value in row[1:])] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    text = "\n".join(lines)
    (directory / "folds.md").write_text(
        f"Each of {folds} folds at its best checkpoint; std is the standard deviation over folds (n - 1).\n\n{text}\n"
    )
    print_text(f"folds      {directory}\n\n{text}", flush=True)


def _best(run: Path) -> dict[str, float]:
    """Return the optimizer step and metrics of a run's best checkpoint, the monitored metric first.

    Without a best checkpoint, those of the last validation.
    """
    best = json.loads((run / "run.json").read_text()).get("best")
    rows: list[dict[str, str]] = []
    with contextlib.suppress(FileNotFoundError), open(run / "metrics.csv", newline="") as file:  # too few steps
        rows = [row for row in csv.DictReader(file) if any(row[name] for name in row if name.startswith("val/"))]
    if best is not None:
        step = checkpoint_step(Path(best["checkpoint"]))
        rows = [row for row in rows if int(row["step"]) == step] or rows
    if not rows:
        raise ValueError(f"{run} has no validation metrics to report: the data need a validation split")
    measured = {name: float(value) for name, value in rows[-1].items() if name.startswith("val/") and value}
    first = {best["metric"]: float(best["value"])} if best is not None else {}
    return {**first, **measured, "step": float(rows[-1]["step"])}
