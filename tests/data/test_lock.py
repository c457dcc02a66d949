"""A run directory that is trained, and a cache folder that is filled, belong to one process, until that ends in any way."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bigmodel.data import lock
from bigmodel.data.cache import building
from bigmodel.data.lock import Held, Lock

FIT_FLAGS = ["--trainer.max_steps", "4", "--trainer.max_epochs", "null"]
HOLDER = """
import os, sys, time
from pathlib import Path
from bigmodel.data.lock import Lock
lock = Lock(Path(sys.argv[1]))
child = os.fork()  # as a reader of data, which may outlive its parent
if not child:
    print(os.getpid(), flush=True)
time.sleep(100)
"""


def snapshot(folder):
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_lock_ends_with_its_process_even_if_killed_and_its_readers_live_on(tmp_path):
    path = tmp_path / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True) as holder:
        reader = int(holder.stdout.readline())
        try:
            with pytest.raises(Held, match=f"process {holder.pid} on "):
                Lock(path)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            Lock(path).release()
            assert path.read_bytes() == b"", "and a released one names nobody"
        finally:
            os.kill(reader, signal.SIGKILL)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(lock, "RENEWAL", 0.05)
    monkeypatch.setattr(lock, "WATCH", 0.5)


@pytest.mark.parametrize("where", ["no flock", "another machine"])
def test_where_flock_cannot_decide_the_holder_must_renew(tmp_path, monkeypatch, fast, where):
    """The other holder has this process's host and id, as in another container."""
    path = tmp_path / ".lock"
    if where == "no flock":

        def unsupported(*args):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", unsupported)
        first = Lock(path)
    else:
        content = {"host": "a", "machine": "another", "pid": os.getpid(), "token": "0"}
        path.write_text(json.dumps(content))
        stop = threading.Event()
        threading.Thread(target=lambda: [os.utime(path) for _ in iter(lambda: stop.wait(0.05), True)]).start()
    with pytest.raises(Held, match=f"process {os.getpid()} on "):
        Lock(path)
    if where == "no flock":
        first._released.set()  # killed: the file is not emptied
    else:
        stop.set()
    Lock(path).release()


def test_a_live_run_is_not_resumed(bm):
    bm("fit", "--callbacks.last.every_n_steps", 2, "--callbacks.last.every_n_minutes", "null")
    (run,) = Path("runs").glob("*/*")
    held, before = Lock(run / ".lock"), snapshot(run)
    error = bm("fit", "--resume", run, "--trainer.max_steps", 6, fails=True)
    assert f"{run} is being trained by process {os.getpid()} on " in error
    assert {**snapshot(run), **before} == before
    held.release()
    bm("fit", "--resume", run, "--trainer.max_steps", 6)
    assert json.loads((run / "run.json").read_text())["step"] == 6


def test_folders_being_filled_stay_and_remains_go(tmp_path):
    """Whatever the processes' ids, which containers share."""
    final = tmp_path / "key"
    with building(final) as live:
        remains = tmp_path / ".key.0123"
        remains.mkdir()
        (tmp_path / ".key.0123.lock").touch()
        with building(final) as second:
            assert live.exists()
            assert live != second
            assert not remains.exists()
            (second / "content").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["content", "key"]
