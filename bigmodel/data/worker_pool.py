"""Pool of worker processes that share nothing with their parent, and start in a tenth of a second.

The pools of `concurrent.futures` fork the parent, which is unsafe with torch's threads, or import its `__main__` again,
which takes seconds for Lightning and fails in a script without a guard (tests/data/test_worker_pool.py). A worker here is
`python -m` of this module: it reads pickled calls from its standard input and writes results to its standard output. It
ends when its parent does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import IO, Any, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")


class WorkerPool:
    """Pool of worker processes, to be used as a context manager.

    Args:
        num_processes: number of workers; all start at once.
        environment: variables set for the workers, in addition to the parent's.
    """

    def __init__(self, num_processes: int, environment: dict[str, str] | None = None) -> None:
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
        command = [sys.executable, "-P", "-m", __name__]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables)
            for _ in range(num_processes)
        ]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(num_processes)  # each waits for one process

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # from a call that was being sent
                        stream.close()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return the function's result, computed by one worker. Its exceptions are raised here."""
        return self._threads.submit(self._call, function, arguments).result()

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results in the order of the items, with at most two items per process read ahead."""
        running: deque[Future[Result]] = deque()
        for item in items:
            running.append(self._threads.submit(self._call, function, (item,)))
            if len(running) > 2 * len(self._processes):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()

    def _call(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        process = self._idle.get()
        calls, answers = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        try:
            pickle.dump((function, arguments), calls)
            calls.flush()
            succeeded, value = pickle.load(answers)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"a worker process ended with exit status {process.wait()} (-9: killed, often because memory ran out)"
            ) from error
        finally:
            self._idle.put(process)
        if not succeeded:
            raise value
        result: Result = value
        return result


def serve() -> None:
    """Process calls until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output printed by a library must not mix with the results
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, error)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
