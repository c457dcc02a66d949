"""`bigmodel check-task`: run the conformance tests of a task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bigmodel.cli import plugins
from bigmodel.data.text import print_text
from bigmodel.run.config import Config, parse_flags

if TYPE_CHECKING:
    from bigmodel.testing.checks import CheckResult

_HELP = """\
bigmodel check-task TASK [-c EXPERIMENT.yaml ...] [--KEY VALUE ...]

Runs the conformance checks of a task in short runs on the CPU, and prints a line for each: ok, FAIL with a remedy, or skip
with the reason. The exit status is 1 if any check failed.

A TASK is the name of an installed one (`bigmodel list`) or an import path, package.module.Class. Without -c, the experiment
in its package is used: experiment.yaml in the folder of its module, or experiments/<task>/check.yaml. Flags override it, to
make the runs small: --data.path PATH, --model.net.width 8. Batches have at most 16 samples.

  task, data, batch, loaders   the requirements of bigmodel.protocols
  resume                       a stopped and resumed run equals an uninterrupted one, bitwise, with dropout
  loss                         a sum and a count
  accumulation, two processes, sharding
                               equal to one process that takes the batch at once, without dropout
  bf16                         its first loss is close to that of float32
  evaluation                   each sample counts once, on any number of processes
  logits, predict, generate, corpus, on_policy, recommend
                               optional protocols, if implemented
  reload                       the trained task is restored from its checkpoint without data
"""


def run_check_task(argv: list[str]) -> None:
    """Check a task, and print the results.

    Raises:
        ValueError: if there is no such task, or no experiment to check it with.
        SystemExit: with status 1, if a requirement is violated.
    """
    if {"-h", "--help"} & set(argv):
        print_text(_HELP, end="")
        return
    positional, files, flags = parse_flags(argv)
    if len(positional) != 1:
        raise ValueError("name one task, as in `bigmodel check-task my_task`; `bigmodel list` shows the tasks")
    path, files = _task_and_experiment(positional[0], files)
    start = time.monotonic()

    from bigmodel.cli.trainer_cli import merge_config
    from bigmodel.protocols import PROTOCOL_VERSION

    config = merge_config(files, flags)
    configured = {key: _class_path(config, key, files[-1]) for key in ("model", "data")}
    plugins.check_classes(config, [Path.cwd()])
    try:
        task, same, _ = (plugins.import_class(name) for name in (path, configured["model"], configured["data"]))
    except (Exception, SystemExit) as error:  # any exception of the package's own code
        _print(
            "FAIL",
            "import",
            f"{path}: {type(error).__name__}: {error}. Correct the error, or install the missing package",
        )
        sys.exit(1)
    if same is not task:
        raise ValueError(
            f"{files[-1]} is an experiment with {configured['model']}, not with {path}: name another with -c"
        )
    print_text(f"{path}, as in {files[-1]}; protocol version {PROTOCOL_VERSION}")
    failed = False
    for _, result in check([config]):
        failed |= result.status == "FAIL"
        _print(result.status, result.check, result.text)
    print_text(f"{'some checks failed' if failed else 'all checks passed'} ({time.monotonic() - start:.0f} s)")
    if failed:
        sys.exit(1)


def _task_and_experiment(name: str, files: list[str]) -> tuple[str, list[str]]:
    """Return the import path of the requested task, and the experiment to check it with."""
    task = plugins.find_task(name)
    if task is None and "." not in name:
        installed = ", ".join(dict.fromkeys(task.name for task in plugins.installed_tasks()))
        raise ValueError(
            f"no task {name!r} is installed; choose one of {installed}, or give an import path, package.module.Class"
        )
    example = plugins.experiment_of(task) if task is not None else None
    if not files and example is None:
        raise ValueError(f"the package of {name} has no experiment: give one with -c EXPERIMENT.yaml")
    return (task.path if task is not None else name), files or [str(example)]


def _class_path(config: Config, key: str, file: str) -> str:
    block = config.get(key)
    if isinstance(block, str):
        block = config[key] = {"class_path": block}
    if not isinstance(block, dict) or "class_path" not in block:
        raise ValueError(f"{file} names no class for {key}: add {key}: {{class_path: package.module.Class}}")
    return str(block["class_path"])


def _print(status: str, check: str, text: str) -> None:
    print_text(f"{status:4} {check:13} {text}", flush=True)


def check(configs: Sequence[Config]) -> Iterator[tuple[int, CheckResult]]:
    """Check the tasks of several configurations, all with one pair of processes.

    Args:
        configs: merged configurations, one per task.

    Yields:
        Results as they occur, each with the number of its configuration.
    """
    import torch

    from bigmodel.cli.lightning_warnings import quiet_lightning
    from bigmodel.testing.suite import ConformanceSuite

    quiet_lightning()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are reproducible, and the nets are small
    try:
        with tempfile.TemporaryDirectory(prefix="bigmodel-check-task-") as name:
            folder = Path(name)
            names = [str(number) for number in range(len(configs))]
            suites = [ConformanceSuite(config, folder / name) for name, config in zip(names, configs, strict=True)]
            (folder / "tasks.json").write_text(json.dumps(names))
            with _two_processes(folder):
                for number, suite in enumerate(suites):
                    yield from ((number, result) for result in suite.on_one_process())
                for number, suite in enumerate(suites):
                    yield from ((number, result) for result in suite.on_two_processes())
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _two_processes(folder: Path) -> Iterator[None]:
    """Start two processes, which import their modules while the checks on one process run."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "w+") as output:
        command = [*launch, "bigmodel.testing.worker", str(folder), str(os.getpid())]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

        def wait() -> None:
            process.wait()
            lines = (folder / "output").read_text(errors="replace").splitlines() or ["no output"]
            (folder / "ended").write_text(next((line for line in reversed(lines) if "Error" in line), lines[-1]))

        watcher = threading.Thread(target=wait, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            process.terminate()  # torchrun terminates its workers
            watcher.join()
