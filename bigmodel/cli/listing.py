"""`bigmodel list`: tasks, experiments and runs, from metadata and files alone; no task is imported."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from bigmodel.cli.settings import parse_flags

_HELP = """\
bigmodel list [--runs_dir DIR] [--experiments DIR]

Shows the tasks that are installed, the experiments in a folder (experiments/), and the runs in another (runs/), the newest
last, each with its status, optimizer step and best metric.
"""


def run_list(argv: list[str]) -> None:
    """Print the three lists."""
    if {"-h", "--help"} & set(argv):
        print(_HELP, end="")
        return
    flags = dict(parse_flags(argv)[2])
    unknown = flags.keys() - {"runs_dir", "experiments"}
    if unknown:
        raise ValueError(f"`bigmodel list` has no flag --{unknown.pop()}; it has --runs_dir and --experiments")
    print("tasks")
    for task in sorted(importlib.metadata.entry_points(group="bigmodel.tasks"), key=lambda task: task.name):
        package = f" ({task.dist.name} {task.dist.version})" if task.dist is not None else ""
        print(f"  {task.name:24} {task.value.replace(':', '.')}{package}")
    experiments = Path(flags.get("experiments", "experiments"))
    print(f"\nexperiments in {experiments}/")
    for path in sorted(experiments.glob("**/*.yaml")):
        print(f"  {path!s:50} {_first_comment(path)}")
    runs_dir = Path(flags.get("runs_dir", "runs"))
    print(f"\nruns in {runs_dir}/")
    records = [(path, json.loads(path.read_text())) for path in runs_dir.glob("**/run.json")]
    for path, record in sorted(records, key=lambda pair: pair[1]["created"]):
        best = record.get("best")
        metric = f"{best['metric']} {best['value']:.5g}" if best else ""
        print(f"  {path.parent!s:60} {record['status']:11} step {record.get('step', 0):<8,} {metric}")


def _first_comment(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        first = file.readline().strip()
    return first.lstrip("# ") if first.startswith("#") else ""
