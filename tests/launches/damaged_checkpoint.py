"""Resume from a damaged checkpoint on two processes: `python forked.py 2 damaged_checkpoint.py RUN TABLE`.

Run by test_checkpoint.py, where RUN is the directory of a run whose newest checkpoint is damaged.
"""

import os
import sys
from pathlib import Path

import torch

from bigmodel.checkpoint import files, find_damage
from bigmodel.checkpoint import selection as choose
from bigmodel.cli import main


def counted(path):
    """Call `find_damage`, and record the call of this process."""
    with open(f"verified.{os.environ['RANK']}", "a") as file:
        file.write(Path(path).name + "\n")
    return find_damage(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run, table = sys.argv[1:]
    files.find_damage = choose.find_damage = counted
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.path", table]
    main(["validate", run, "--checkpoint", "last", *two])
    main(["fit", "--resume", run, "--trainer.max_steps", "12", "--callbacks.last.asynchronous", "true", *two])
