"""The run directory: make one, find one, resume one, load a finished one.

runs/<experiment>/<time>-<id>/
    config.yaml      the resolved configuration; `bigmodel fit -c` on it is the same run again, in a directory of its own
    run.json         command, git revision, package versions, step, best metric, W&B id, and the status: running, finished,
                     preempted (told to stop), interrupted (by hand) or failed
    metrics.csv      every metric by optimizer step
    checkpoints/     last-<step>.ckpt and best-<step>.ckpt: files, or folders where tensors are sharded
    wandb/           what Weights & Biases keeps

Where the environment variable BIGMODEL_RUN_FILE names a file, a fit writes its run directory there when it begins: that is
how a script that launched it knows what to resume. BIGMODEL_RUN_DIRECTORY, where it is set, is the run directory that a new
run makes, and BIGMODEL_LAST the one that `last` means.
"""

from bigmodel.checkpoint import checkpoint_step, find_checkpoint
from bigmodel.run.loading import build, describe, find_average, load, load_data, set_sizes, sizes
from bigmodel.run.places import find, new_directory
from bigmodel.run.record import RunDirectory, directory, parameters, runs_dir, settle

__all__ = [
    "RunDirectory",
    "build",
    "checkpoint_step",
    "describe",
    "directory",
    "find",
    "find_average",
    "find_checkpoint",
    "load",
    "load_data",
    "new_directory",
    "parameters",
    "runs_dir",
    "set_sizes",
    "settle",
    "sizes",
]
