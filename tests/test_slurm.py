"""scripts/slurm.sh with a SLURM of three lines: a job stopped by a signal is queued again, and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from stopping import experiment

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm.sh"
COMMANDS = {
    "srun": 'echo "srun $*" >> calls; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "torchrun": 'while [[ $1 == --* ]]; do shift; done; exec "$PYTHON" "$@"',
    "scontrol": 'echo "scontrol $*" >> calls; if [[ $1 == show ]]; then echo node-3; echo node-4; fi',
}


@pytest.fixture
def job(tmp_path):
    """Start the job as SLURM would, in an empty folder; returns its output, its exit status and what it called."""
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    python_path = os.pathsep.join([str(Path(__file__).parent / "launches"), os.environ.get("PYTHONPATH", "")])
    variables = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable,
        "PYTHONPATH": python_path, "SLURM_JOB_ID": "4217", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node-[3-4]",
    }  # fmt: skip

    def run(arguments, restart=0):
        (tmp_path / "calls").unlink(missing_ok=True)
        environment = {**variables, "SLURM_RESTART_COUNT": str(restart)}
        result = forked.call(["bash", SCRIPT, *arguments], env=environment, cwd=tmp_path, stderr=subprocess.STDOUT)
        calls = tmp_path / "calls"
        return result.stdout, result.returncode, calls.read_text() if calls.exists() else ""

    run.folder = tmp_path
    return run


def test_a_job_goes_back_into_the_queue_and_on_in_the_same_run(job, table):
    signal = ["--callbacks.signal", "stopping.SignalParent", "--callbacks.signal.batches", "20"]
    arguments = experiment(table, "runs", *signal, "--callbacks.signal.number", "SIGUSR1")
    out, status, calls = job(arguments)
    assert status == 0, out
    assert "scontrol requeue 4217" in calls
    assert "--nnodes=1 --nproc-per-node=1 --rdzv-id=4217-0 --rdzv-backend=c10d --rdzv-endpoint=node-3:24217" in calls
    (run,) = (path.parent for path in job.folder.glob("runs/**/run.json"))
    assert (job.folder / ".slurm" / "4217.run").read_text() == f"{run}\n"
    assert f"slurm.sh: job 4217 goes back into the queue, to go on with {run}" in out
    first = json.loads((run / "run.json").read_text())
    assert first["status"] == "preempted"
    assert first["step"] >= 20

    out, status, calls = job(arguments, restart=1)
    assert status == 0, out
    assert f"fit --resume {run} --trainer.num_nodes 1" in calls
    assert "requeue" not in calls
    (again,) = job.folder.glob("runs/**/run.json")
    second = json.loads(again.read_text())
    assert second["status"] == "finished"
    assert second["wandb_id"] == first["wandb_id"]
    assert [session["step"] for session in second["sessions"]] == [0, first["step"]]
    assert not list((job.folder / ".slurm").iterdir()), "what is finished need not be remembered"


def test_a_job_that_fails_is_not_put_back(job):
    (job.folder / "bin" / "torchrun").write_text("#!/bin/sh\necho it failed; exit 7\n")
    out, status, calls = job(["-c", "experiment.yaml"])
    assert status == 7
    assert "it failed" in out
    assert "requeue" not in calls
    out, status, _ = job([])
    assert status == 2
    assert "give what bigmodel fit takes" in out
