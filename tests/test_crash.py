"""A small round of scripts/crash_test.py: killed three times, while it writes checkpoints too, and bitwise the same."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_run_that_is_killed_and_resumed_ends_bitwise_as_one_left_alone():
    command = [sys.executable, "scripts/crash_test.py", "--kills", "3", "--tasks", "outsider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert sum("  kill " in line for line in result.stdout.splitlines()) == 3
    task, _, kills, _, resumes, compared, differing, _ = result.stdout.splitlines()[-1].split()
    assert (task, kills, differing) == ("outsider", "3", "0")
    assert int(resumes) > 0
    assert int(compared) > 20
