"""The suite ends, fails and names the test when one of its processes dies or hangs; all other tests run."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
FINE = "def test_{0}(): pass\n"
LAST_WORDS = {  # the body of a test that ends, or does not end, its process
    "exits": "os._exit(1)",
    "aborts": "os.abort()",
    "is_killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "segfaults": "ctypes.string_at(0)",
    "leaves_a_child": "os.fork() and os._exit(1)\n    time.sleep(100)",  # which has a copy of every open pipe
    "hangs": "ctypes.PyDLL(None).sleep(100)",  # and no other thread can run any Python
}


def run(folder, *options):
    """Run a suite in this folder, with the project's configuration; returns exit status and output."""
    (folder / "conftest.py").write_text('pytest_plugins = ["suite"]\n')
    command = [sys.executable, "-m", "pytest", *options, "-c", ROOT / "pyproject.toml", "--rootdir", folder, folder]
    command += ["--basetemp", folder / "temporary"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    with open(folder / "printed", "w") as printed:
        suite = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment, start_new_session=True)
        try:
            status = suite.wait(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(suite.pid, signal.SIGKILL)  # the child that is left
    return status, (folder / "printed").read_text()


def test_it_ends_whatever_happens(tmp_path):
    for name, words in LAST_WORDS.items():
        test = f"import ctypes, os, signal, time\n\ndef test_{name}():\n    {words}\n"
        (tmp_path / f"test_{name}.py").write_text(FINE.format("before") + test + FINE.format("after"))
    (tmp_path / "test_lone.py").write_text("import os\n\ndef test_lone(): os._exit(1)\n")
    for number in range(4):
        (tmp_path / f"test_fine_{number}.py").write_text("".join(map(FINE.format, "abcd")))
    (make,) = re.findall(r"-m pytest (.*)", (ROOT / "Makefile").read_text())
    status, printed = run(tmp_path, *make.split(), "-o", "faulthandler_timeout=15")
    assert status == 1, printed
    failed = set(re.findall(r"crashed while running '.*::test_(\w+)'", printed))
    assert failed == {*LAST_WORDS, "lone"}, printed
    assert f"{len(failed)} failed, {2 * len(LAST_WORDS) + 4 * 4} passed" in printed, printed
    assert "Timeout (0:00:15)!" in printed, printed
    assert re.search(r'File ".*test_hangs.py", line \d+ in test_hangs', printed), "where it hung"


@pytest.mark.parametrize("options", [[], ["--numprocesses", "1", "--dist", "loadfile"]], ids=["alone", "distributed"])
def test_a_fixture_may_not_hang_after_a_failure(tmp_path, options):
    (tmp_path / "test_it.py").write_text(
        "import pytest, time\n\n@pytest.fixture\ndef slow():\n    yield\n    time.sleep(100)\n\n"
        "def test_it(slow):\n    assert False, 'as meant'\n"
    )
    status, printed = run(tmp_path, *options, "-o", "faulthandler_timeout=8")
    assert status == 1, printed
    assert re.search(r'File ".*test_it.py", line \d+ in slow', printed), "where it hung"


def test_a_command_that_hangs_is_ended_with_what_it_has_started(monkeypatch):
    monkeypatch.setattr(forked, "LIMIT", 3.0)
    with pytest.raises(AssertionError, match=r"not ended within 3 s:\nchild \d+") as failure:
        forked.call(["sh", "-c", "sleep 1000 & echo child $!; wait"])
    child = re.search(r"child (\d+)$", str(failure.value), re.MULTILINE).group(1)
    ask = ["ps", "-o", "stat=", "-p", child]
    while subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()[:1] not in ("", "Z"):
        time.sleep(0.01)  # it does not die at once
