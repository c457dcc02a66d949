"""`python forked.py N SCRIPT WORDS`: a script in N processes at once, as `torchrun --standalone` runs it, at a third of the
price: they are forked from one process, which has imported what each of them would import for seconds."""

import gc
import os
import runpy
import signal
import subprocess
import sys
import traceback


def run(script, *words, processes=2, cwd=None, timeout=300):
    """Run a script in so many processes, of which none may fail; returns what they printed, as `subprocess.run` does."""
    command = [sys.executable, __file__, str(processes), script, *words]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def work(script, *words):
    """One of the processes; RANK and the other variables are set."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # not the launcher's handlers
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from lightning.pytorch.utilities import rank_zero_only
    from torchmetrics.utilities import prints

    rank_zero_only.rank = prints.rank_zero_only.rank = int(
        os.environ["RANK"]
    )  # which they look up when they are imported
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()  # torch shows that of one process alone
        raise


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that has threads cannot be forked safely
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import bigmodel.cli.verbs  # noqa: F401

    number, script, *words = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(number), run_id="tests", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
    )  # fmt: skip
    gc.collect()  # here once, not in each process at the start of each run
    gc.freeze()
    elastic_launch(config, work)(script, *words)
