"""A small round of scripts/crash_test.py: killed while it writes checkpoints too, and the same as one left alone."""

import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("how", "kills"),
    [([], 3), (["--layouts"], 3)],
    ids=["one process, bitwise", "one process and two in turns, the same samples"],
)
def test_a_run_that_is_killed_and_resumed_ends_as_one_left_alone(how, kills):
    command = [sys.executable, "scripts/crash_test.py", "--kills", str(kills), "--tasks", "outsider", *how]
    result = forked.call(command, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sum("  kill " in line for line in result.stdout.splitlines()) == kills
    row = result.stdout.splitlines()[-1].split()
    task, _, killed, _, resumes, changes, compared, differing, _, _ = row
    assert (task, killed, differing) == ("outsider", str(kills), "0")
    assert int(resumes) > 0
    assert int(changes) == (int(resumes) if how else 0)
    assert int(compared) > 20
