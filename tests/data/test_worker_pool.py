"""The reason for a worker pool of our own. What it computes: tasks/language_modeling/test_prepare.py."""

import subprocess
import sys

import pytest

STANDARD = """
import math, multiprocessing
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("{method}")) as pool:
    print(list(pool.map(math.factorial, range(4))))
"""
OURS = """
import math
from bigmodel.data.worker_pool import WorkerPool
with WorkerPool(2) as pool:
    print(list(pool.map(math.factorial, range(4))))
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_standard_pools_fail_in_a_script_without_a_guard(tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(STANDARD.format(method=method))
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode != 0
    assert "BrokenProcessPool" in result.stderr


def test_workers_run_in_a_script_without_a_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OURS)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.stdout == "[1, 1, 2, 6]\n", result.stderr
