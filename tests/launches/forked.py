"""`python forked.py N SCRIPT ARGUMENTS`: run a script in N processes, like `torchrun --standalone` in a third of its time:
they are forked from one process that has imported the modules."""

import contextlib
import gc
import os
import runpy
import signal
import subprocess
import sys
import traceback

LIMIT = 400.0  # seconds: far above what a launch needs beside other work, and below the time limit of a test
GRACE = 45.0  # seconds in which a launcher ends its processes


def run(script, *arguments, processes=2, cwd=None):
    """Run a script in so many processes, of which none may fail; returns what they printed, as `subprocess.run` does."""
    result = call([sys.executable, __file__, str(processes), script, *arguments], cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def call(command, *, stderr=subprocess.PIPE, **options):
    """Run a command as `subprocess.run` does, its output captured; what hangs is ended, with all that it has started."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True, **options
    ) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun's processes are in sessions of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate(timeout=GRACE)
            raise AssertionError(f"{command} has not ended within {LIMIT:g} s:\n{output}{errors or ''}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def work(script, *arguments):
    """One of the processes; RANK and the other variables are set."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # not the launcher's handlers
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from lightning.pytorch.utilities import rank_zero_only
    from torchmetrics.utilities import prints

    rank_zero_only.rank = prints.rank_zero_only.rank = int(
        os.environ["RANK"]
    )  # which they look up when they are imported
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()  # torch shows that of one process alone
        raise


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that has threads cannot be forked safely
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import bigmodel.cli.trainer_cli
    import bigmodel.training.precision

    bigmodel.training.precision.bf16_speed = lambda shape: 1.0  # as in conftest.py: float32 is chosen on any machine

    number, script, *arguments = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(number), run_id="tests", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
    )  # fmt: skip
    gc.collect()  # here once, not in each process at the start of each run
    gc.freeze()
    elastic_launch(config, work)(script, *arguments)
