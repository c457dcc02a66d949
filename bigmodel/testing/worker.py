"""Two-process part of `bigmodel check-task`: `torchrun --nproc-per-node 2 -m bigmodel.testing.worker FOLDER PID`.

FOLDER/plans.json lists folders, one per task, each with its config.json; a file `ready` appears when the runs of one
process are done. Written to each: `reload.json`, `ddp.pt`, `sharded.pt` (results of the first process), or
`NAME.error`. PID is the process of the command; if it is killed, these two end as well.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigmodel import run
from bigmodel.checkpoint import read
from bigmodel.cli.lightning_warnings import quiet_lightning
from bigmodel.run.config import Config
from bigmodel.testing import short_runs

_SHARDED = {"class_path": "bigmodel.parallel.ShardedStrategy"}


def main(folder: Path, pid: int) -> None:
    """Process all plans."""
    torch.set_num_threads(1)
    quiet_lightning()
    doors = _DataAccessGuard()
    for name in json.loads((folder / "plans.json").read_text()):
        plan = folder / name
        if not wait_for_file(plan / "ready", pid):
            return
        ready = json.loads((plan / "ready").read_text())
        if ready["checkpoint"] is None:  # no run succeeded on one process
            continue
        config, checkpoint = json.loads((plan / "config.json").read_text()), Path(ready["checkpoint"])
        if os.environ["RANK"] == "0":  # first, in a process that has not read any data
            _try(plan / "reload", lambda: doors.closed(config, lambda: _reload(checkpoint)))  # noqa: B023
        _try(plan / "ddp", lambda: _train(config, plan, "ddp", checkpoint))  # noqa: B023
        _try(plan / "sharded", lambda: _train(config, plan, _SHARDED, None))  # noqa: B023


def wait_for_file(path: Path, pid: int) -> bool:
    """Wait until a file exists; False if the process that was to write it has ended."""
    while not path.exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def _try(path: Path, work: Callable[[], Any]) -> None:
    try:
        found = work()
    except (Exception, SystemExit) as error:  # the task's own code may raise any exception
        path.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        return
    if os.environ["RANK"] == "0":
        partial = path.with_suffix(".partial")
        torch.save(found, partial)
        partial.rename(path.with_suffix(".pt"))


def _train(config: Config, plan: Path, strategy: Any, checkpoint: Path | None) -> dict[str, Any]:
    two = {"devices": 2, "strategy": strategy}
    made = short_runs.short_run_config(config, plan / "runs", comparable=True, **two)
    trial = short_runs.fit(made, short_runs.ShortRun(dropout=False))
    taken: list[Any] = [None, None]
    torch.distributed.all_gather_object(taken, trial.taken)
    found = {"end": trial.end, "taken": [sorted(a + b) for a, b in zip(*taken, strict=True)]}
    if checkpoint is not None and short_runs.has_split(trial.data, "val_dataloader"):
        seen = short_runs.evaluate(made, checkpoint, short_runs.batch_size(config) // 2)
        evaluated: list[Any] = [None, None]
        torch.distributed.all_gather_object(evaluated, seen.evaluated)
        found |= {"evaluated": sorted(evaluated[0] + evaluated[1]), "metrics": seen.metrics}
    return found


def _reload(checkpoint: Path) -> dict[str, Any]:
    return {"state_dict": run.load(checkpoint).state_dict(), "written": read(checkpoint)["state_dict"]}


class _DataAccessGuard:
    """Blocks access to the files named in the data's config."""

    def __init__(self) -> None:
        self._shut: tuple[Path, ...] = ()
        sys.addaudithook(self._watch)  # an audit hook cannot be removed

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._shut and isinstance(arguments[0], str | bytes):
            path = Path(os.fsdecode(arguments[0])).absolute()
            for shut in self._shut:
                if path == shut or shut in path.parents:
                    raise FileNotFoundError(f"{path} belongs to the data, which are gone")

    def closed(self, config: Config, work: Callable[[], Any]) -> Any:
        arguments = json.loads(json.dumps(config["data"].get("init_args") or {}))
        words = [word for value in arguments.values() for word in (value if isinstance(value, list) else [value])]
        paths = [Path(word).absolute() for word in words if isinstance(word, str) and os.path.exists(word)]
        self._shut = tuple(path for path in paths if path not in Path.cwd().absolute().parents and path != Path.cwd())
        try:
            return work()
        finally:
            self._shut = ()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
