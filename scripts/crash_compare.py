"""Comparison of a run that was killed and resumed with an uninterrupted run. Importing it loads no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Another number of processes adds the same gradients in another order: no bitwise equality, but float32's rounding.
TOLERANCE = 2e-6


class Comparison(NamedTuple):
    """Result: number of compared values, names of those that differ, and the largest difference of a weight."""

    compared: int
    differing: list[str]
    largest: float = 0.0


def compare_bitwise(straight: Path, crashed: Path, killed_at_end: bool) -> Comparison:
    """Tensors and columns of metrics of two runs on the same layout. A run that is killed while its last checkpoint is being
    written has that in part, for nothing is left to resume; else it has the same files."""
    from bigmodel.cli.formatting import find_differences

    both: list[dict[str, Any]] = []
    for directory in (straight, crashed):
        last, best = _read(directory, "last"), _read(directory, "best")
        content = {
            "last": {key: last[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")},
            "average": last["callbacks"]["EMA"]["average"],
            "best": {key: best[key] for key in ("global_step", "state_dict")},
            "metrics.csv": _metrics(directory),
            "files": "" if killed_at_end else sorted(path.name for path in (directory / "checkpoints").iterdir()),
        }
        both.append(content)
    return Comparison(sum(1 for _ in _leaves(both[0])), find_differences(*both))


def compare_layouts(straight: Path, crashed: Path, killed_at_end: bool) -> Comparison:
    """Weights and average, within the tolerance, and the samples of each optimizer step, which must be the same ones, of a
    run whose sessions had different layouts. Samples are looked for in `<runs_dir>.samples/<session>/`.

    A session may have been killed within its last step, which then has a part of its samples; some session has them all.
    """
    from crash_samples import read_samples

    wrong, largest = [], 0.0
    ours, theirs = _read(straight, "last"), _read(crashed, "last")
    if ours["global_step"] != theirs["global_step"]:
        wrong.append(f"the last step: {theirs['global_step']}, not {ours['global_step']}")
    pairs = {"average": [content["callbacks"]["EMA"]["average"] for content in (ours, theirs)]}
    pairs["state_dict"] = [ours["state_dict"], theirs["state_dict"]]
    compared = 0
    for kind, (a, b) in pairs.items():
        for name in a.keys() | b.keys():
            compared += 1
            difference = (a[name].double() - b[name].double()).abs().max().item() if name in a and name in b else 1.0
            largest = max(largest, difference)
            if not difference <= TOLERANCE:
                wrong.append(f"{kind}/{name} by {difference:.1e}")

    (expected,) = [read_samples(path) for path in _sessions(straight)]
    seen: set[int] = set()
    for path in _sessions(crashed):
        taken = read_samples(path)
        for step, samples in taken.items():
            cut_off = step == max(taken) and set(samples) <= set(expected[step])
            if samples == expected[step]:
                seen.add(step)
            elif not cut_off:
                wrong.append(f"samples of step {step} in session {path.name}")
    wrong += [f"samples of step {step}, which no session took" for step in expected.keys() - seen]
    return Comparison(compared + len(expected), wrong, largest)


def _sessions(directory: Path) -> list[Path]:
    runs_dir = directory.parents[1]
    return list(runs_dir.with_name(runs_dir.name + ".samples").iterdir())


def _read(directory: Path, which: str) -> dict[str, Any]:
    from bigmodel.checkpoint import find_checkpoint, read

    return read(find_checkpoint(directory, which))


def _leaves(content: Any) -> Iterator[Any]:
    """Tensors, and columns of metrics."""
    from torch import Tensor

    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from value.items() if key == "metrics.csv" else _leaves(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _leaves(value)


def _metrics(directory: Path) -> dict[str, str]:
    """The columns of metrics.csv, each with its steps in one text; without speeds, which are those of the machine."""
    columns: dict[str, list[str]] = {}
    with open(directory / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and not name.startswith("speed/"):
                    columns.setdefault(name, []).append(f"{row['step']}: {value}")
    return {name: "\n".join(values) for name, values in columns.items()}
