"""Launches with an error, and one without: `torchrun --nproc-per-node 2 launch.py TABLE OTHER`.

Run by test_rendezvous.py in an empty folder, where OTHER is the directory of a run with another net. The error of each
attempt of each process is written to <attempt>.<rank>.
"""

import contextlib
import io
import os
import sys
import time
from pathlib import Path

import torch
from two_processes import experiment

from bigmodel.cli import main

RANK = os.environ["RANK"]


def attempt(name: str, *arguments: str) -> None:
    """Run the command, and write its error message to a file."""
    errors, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        main(["fit", *arguments])
    Path(f"{name}.{RANK}").write_text(f"{time.monotonic() - start:.1f} s\n{errors.getvalue()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    table, other = sys.argv[1:]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    attempt("alone", *experiment(table, "runs"))
    attempt("three", *experiment(table, "runs", "--trainer.devices", "3", "--trainer.strategy", "ddp"))
    attempt("sharded", *experiment(table, "runs", "--trainer.devices", "2", "--trainer.strategy", "fsdp"))
    batch = ["--data.micro_batch_size", "3"] if RANK == "0" else ["--data.micro_batch_size", "6"]
    attempt("unlike", *experiment(table, "runs", *two, *batch))
    attempt("indivisible", *experiment(table, "runs", *two, "--data.batch_size", "13"))
    attempt("other", "--resume", other, *two, "--model.net.width", "24")
    attempt("well", *experiment(table, "runs", *two))
    if RANK == "1":  # the first waits in vain
        sys.exit()
    os.environ["BIGMODEL_RENDEZVOUS_SECONDS"] = "1"
    attempt("missing", *experiment(table, "runs", *two))
    Path("done").touch()
