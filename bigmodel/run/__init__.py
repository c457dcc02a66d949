"""Run directories: create, find, resume and load runs.

runs/<experiment>/<time>-<id>/
    config.yaml      the resolved configuration; `bigmodel fit -c` on it repeats the run, in a directory of its own
    run.json         command, git revision, package versions, step, best metric, W&B id, and the status: running,
                     finished, preempted (stopped by a signal), interrupted (by hand) or failed
    metrics.csv      every metric by optimizer step
    checkpoints/     last-<step>.ckpt and best-<step>.ckpt: files, or folders if tensors are sharded
    wandb/           files of Weights & Biases

If the environment variable BIGMODEL_RUN_FILE names a file, a fit writes its run directory there when it begins, so that
a script that launched it can resume it. BIGMODEL_RUN_DIRECTORY, if set, is the directory of a new run, and
BIGMODEL_LAST the run that `last` refers to.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigmodel.checkpoint import checkpoint_step, find_checkpoint
    from bigmodel.run.loading import build, describe, find_average, load, load_data, set_sizes, sizes
    from bigmodel.run.paths import find_run, new_directory
    from bigmodel.run.run_directory import (
        RunDirectory,
        directory,
        format_parameter_count,
        record_resolved_argument,
        runs_dir,
    )

__all__ = [
    "RunDirectory",
    "build",
    "checkpoint_step",
    "describe",
    "directory",
    "find_average",
    "find_checkpoint",
    "find_run",
    "format_parameter_count",
    "load",
    "load_data",
    "new_directory",
    "record_resolved_argument",
    "runs_dir",
    "set_sizes",
    "sizes",
]

_MODULES = {
    "build": "bigmodel.run.loading",
    "checkpoint_step": "bigmodel.checkpoint",
    "describe": "bigmodel.run.loading",
    "directory": "bigmodel.run.run_directory",
    "find_run": "bigmodel.run.paths",
    "find_average": "bigmodel.run.loading",
    "find_checkpoint": "bigmodel.checkpoint",
    "load": "bigmodel.run.loading",
    "load_data": "bigmodel.run.loading",
    "new_directory": "bigmodel.run.paths",
    "format_parameter_count": "bigmodel.run.run_directory",
    "RunDirectory": "bigmodel.run.run_directory",
    "runs_dir": "bigmodel.run.run_directory",
    "set_sizes": "bigmodel.run.loading",
    "record_resolved_argument": "bigmodel.run.run_directory",
    "sizes": "bigmodel.run.loading",
}


def __getattr__(name: str) -> Any:
    """Import lazily, so that the command can respond without importing Lightning."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'bigmodel.run' has no attribute {name!r}")
