"""Two-process part of `bigmodel check-task`: `torchrun --nproc-per-node 2 -m bigmodel.testing.worker FOLDER PID`.

FOLDER/tasks.json lists folders, one per task, each with its config.json; a file `ready` appears in it when the task has
trained on one process. Written to each: `reload.pt`, `ddp.pt`, `sharded.pt` (results of the first process), or
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
from bigmodel.testing.recorder import RunRecorder
from bigmodel.testing.samples import has_split

_SHARDED = {"class_path": "bigmodel.parallel.ShardedStrategy"}


def main(folder: Path, pid: int) -> None:
    """Process all tasks."""
    torch.set_num_threads(1)
    quiet_lightning()
    guard = _DataAccessGuard()
    for name in json.loads((folder / "tasks.json").read_text()):
        task = folder / name
        if not wait_for_file(task / "ready", pid):
            return
        ready = json.loads((task / "ready").read_text())
        if ready["checkpoint"] is None:  # no run succeeded on one process
            continue
        config, checkpoint = json.loads((task / "config.json").read_text()), Path(ready["checkpoint"])
        if os.environ["RANK"] == "0":  # first, in a process that has not read any data
            _try(task / "reload", lambda: guard.block(config, lambda: _reload(checkpoint)))  # noqa: B023
        _try(task / "ddp", lambda: _train(config, task, "ddp", checkpoint))  # noqa: B023
        _try(task / "sharded", lambda: _train(config, task, _SHARDED, None))  # noqa: B023


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
        results = work()
    except (Exception, SystemExit) as error:  # the task's own code may raise any exception
        path.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        return
    if os.environ["RANK"] == "0":
        partial = path.with_suffix(".partial")
        torch.save(results, partial)
        partial.rename(path.with_suffix(".pt"))


def _train(config: Config, folder: Path, strategy: Any, checkpoint: Path | None) -> dict[str, Any]:
    short = short_runs.short_run_config(config, folder / "runs", comparable=True, devices=2, strategy=strategy)
    recorder = short_runs.fit(short, RunRecorder(dropout=False))
    taken: list[Any] = [None, None]
    torch.distributed.all_gather_object(taken, recorder.taken)
    results = {"end": recorder.end, "taken": [sorted(a + b) for a, b in zip(*taken, strict=True)]}
    if checkpoint is not None and has_split(recorder.data, "val_dataloader"):
        evaluation = short_runs.evaluate(short, checkpoint, short_runs.batch_size(config) // 2)
        evaluated: list[Any] = [None, None]
        torch.distributed.all_gather_object(evaluated, evaluation.evaluated)
        results |= {"evaluated": sorted(evaluated[0] + evaluated[1]), "metrics": evaluation.metrics}
    return results


def _reload(checkpoint: Path) -> dict[str, Any]:
    return {"state_dict": run.load(checkpoint).state_dict(), "written": read(checkpoint)["state_dict"]}


class _DataAccessGuard:
    """Blocks access to the files that are arguments of the data module."""

    def __init__(self) -> None:
        self._blocked: tuple[Path, ...] = ()
        sys.addaudithook(self._watch)  # an audit hook cannot be removed

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._blocked and isinstance(arguments[0], str | bytes):
            path = Path(os.fsdecode(arguments[0])).absolute()
            for blocked in self._blocked:
                if path == blocked or blocked in path.parents:
                    raise FileNotFoundError(f"{path} belongs to the data, which `bigmodel.load` must not need")

    def block(self, config: Config, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, which cannot open these files."""
        arguments = json.loads(json.dumps(config["data"].get("init_args") or {}))
        values = [one for value in arguments.values() for one in (value if isinstance(value, list) else [value])]
        paths = [Path(value).absolute() for value in values if isinstance(value, str) and os.path.exists(value)]
        self._blocked = tuple(
            path for path in paths if path not in Path.cwd().absolute().parents and path != Path.cwd()
        )
        try:
            return work()
        finally:
            self._blocked = ()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
