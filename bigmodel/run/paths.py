"""Paths of run directories: creation and search."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from bigmodel.run.record import read_record


def new_directory(runs_dir: str | Path, experiment: str) -> Path:
    """Create `runs_dir/experiment/<time>-<id>`, which must not exist; two runs in the same second get different ones."""
    while True:
        directory = Path(runs_dir) / experiment / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory


def find_run(run: str | Path, runs_dir: str | Path = "runs") -> Path:
    """Return the directory of a run, from its path, from `last`, or from the end of its name.

    `last` is the newest run under `runs_dir`, unless $BIGMODEL_LAST names one.

    Raises:
        ValueError: if there is none, or more than one.
    """
    directory = Path(run)
    if (directory / "config.yaml").is_file():
        return directory
    runs = [path.parent for path in sorted(Path(runs_dir).glob("**/run.json"), key=_created)]
    if str(run) == "last":
        if last := os.environ.get("BIGMODEL_LAST"):
            return Path(last)
        if not runs:
            raise ValueError(f"there is no run under {runs_dir}/; set --runs_dir to the folder of runs")
        return runs[-1]
    matches = [path for path in runs if str(path).endswith(str(run))]
    if len(matches) != 1:
        problem = (
            f"matches {len(matches)} runs: {', '.join(map(str, matches))}" if matches else "is not a run directory"
        )
        raise ValueError(f"{run} {problem}; `bigmodel list` shows the runs under {runs_dir}/")
    return matches[0]


def _created(record: Path) -> str:
    """Return the creation time in this run.json; names are precise only to the second."""
    return str(read_record(record.parent)["created"])
