"""Run directories: create, find, resume and load runs.

runs/<experiment>/<time>-<id>/
    config.yaml      the resolved configuration; `bigmodel fit -c` on it repeats the run, in a directory of its own
    run.json         command, git revision, package versions, step, best metric, W&B id, and the status: running,
                     finished, preempted (stopped by a signal), interrupted (by hand) or failed. A damaged one is
                     named, and the next session writes it anew
    metrics.csv      every metric by optimizer step
    .lock            held while the run is trained: no second process can resume it (`bigmodel.data.lock`)
    checkpoints/     last-<step>.ckpt and best-<step>.ckpt: files, or folders if tensors are sharded
    wandb/           files of Weights & Biases

If the environment variable BIGMODEL_RUN_FILE names a file, a fit writes its run directory there when it begins, so that
a script that launched it can resume it. BIGMODEL_RUN_DIRECTORY, if set, is the directory of a new run, and
BIGMODEL_LAST the run that `last` refers to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigmodel import lazy_attributes

if TYPE_CHECKING:
    from bigmodel.checkpoint import checkpoint_step, find_checkpoint
    from bigmodel.run.loading import build, describe, find_average, load, load_data, set_sizes, sizes
    from bigmodel.run.paths import find_run, new_directory
    from bigmodel.run.run_directory import (
        QuietRunDirectory,
        RunDirectory,
        directory,
        record_resolved_argument,
        runs_dir,
    )
    from bigmodel.run.summary import format_parameter_count

__all__ = [
    "QuietRunDirectory",
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

# The command answers `list` and `--help` without importing Lightning.
__getattr__ = lazy_attributes(
    __name__,
    {
        "bigmodel.checkpoint": "checkpoint_step find_checkpoint",
        "bigmodel.run.loading": "build describe find_average load load_data set_sizes sizes",
        "bigmodel.run.paths": "find_run new_directory",
        "bigmodel.run.run_directory": "QuietRunDirectory RunDirectory directory record_resolved_argument runs_dir",
        "bigmodel.run.summary": "format_parameter_count",
    },
)
