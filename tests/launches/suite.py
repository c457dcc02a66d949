"""Plugin of pytest: if a process of the suite dies, its test fails by name, and the other tests still run.

pytest's own `faulthandler_timeout` (pyproject.toml) ends a process whose test takes too long, even one that hangs outside
Python, and prints the stack of each thread; after that, this plugin lets pytest-xdist continue.
"""

import faulthandler
import os
import sys

import pytest

_error = pytest.StashKey[int]()  # standard error as it is before tests capture it


def _limit(config, seconds=None):
    """End this process after the time limit of a test, or never."""
    faulthandler.cancel_dump_traceback_later()
    seconds = float(config.getini("faulthandler_timeout") if seconds is None else seconds)
    if seconds > 0:
        faulthandler.dump_traceback_later(seconds, exit=True, file=config.stash[_error])


def pytest_configure(config):
    config.stash[_error] = os.dup(sys.__stderr__.fileno())
    channel = next((p.channel for p in config.pluginmanager.get_plugins() if hasattr(p, "channel")), None)
    if channel is not None:  # this is a process of pytest-xdist, whose death shows by the end of its pipe
        nowhere, pipe = os.open(os.devnull, os.O_WRONLY), channel.gateway._io.outfile.fileno()
        os.register_at_fork(after_in_child=lambda: os.dup2(nowhere, pipe, inheritable=False))
        _limit(config)  # of the collection, which imports all tests


def pytest_collection_finish(session):
    _limit(session.config, 0)


@pytest.hookimpl(trylast=True)
def pytest_exception_interact(node):
    """Set the limit again, which pytest removes after a failure, for the teardown of fixtures."""
    _limit(node.config)


def pytest_unconfigure(config):
    _limit(config, 0)
    os.close(config.stash[_error])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Return a `--dist loadfile` scheduler that continues after a process has died (pytest-xdist 3.8, issues 1323 and 1327).

    The original assigns all files of the dead process to another, including finished ones, and waits for them for ever;
    it holds back the last test until a next one is known; and it repeats the test in which the process died.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def remove_node(self, node):
            files = self.assigned_work[node]  # {file: {test: whether it is done}}
            died_of = next((test for tests in files.values() for test, done in tests.items() if not done), None)
            for tests in files.values():
                if died_of in tests:
                    tests[died_of] = True  # failed
            self.assigned_work[node] = {file: tests for file, tests in files.items() if not all(tests.values())}
            super().remove_node(node)
            return died_of

        def _reschedule(self, node):
            if node not in self.registered_collections:  # it has only been started
                return
            super()._reschedule(node)
            while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
                super()._reschedule(node)

    return Scheduling(config, log)
