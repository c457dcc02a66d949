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
from bigmodel.run.config import Config, parse_flags

if TYPE_CHECKING:
    from bigmodel.testing.checks import Finding

_HELP = """\
bigmodel check-task TASK [-c EXPERIMENT.yaml ...] [--KEY VALUE ...]

Tries out what every task promises, in short runs on the CPU, and prints a line for each: ok, FAIL with what to do, or skip
with the reason. The exit status is 1 if anything failed.

A TASK is the name of an installed one (`bigmodel list`) or an import path, package.module.Class. Without -c the experiment
that its package ships is taken: experiment.yaml beside its module, or experiments/<task>/check.yaml. Flags go on top, to
make it small: --data.path PATH, --model.net.width 8. Batches are cut to 16 samples at most.

  task, data, batch, loaders   what bigmodel.protocols asks of them
  resume                       a run stopped and resumed equals one left alone, bitwise, dropout included
  loss                         a sum and a count
  accumulation, two processes, sharding
                               equal one process that takes the batch at once; dropout is switched off for it
  bf16                         its first loss is that of float32
  evaluation                   each sample counts once, on any number of processes
  logits, predict, generate, corpus, on_policy, recommend
                               what it offers besides, if it does
  reload                       the trained task is made from its checkpoint with no data present
"""


def run_check_task(argv: list[str]) -> None:
    """Check a task, and print the findings.

    Raises:
        ValueError: if there is no such task, or no experiment to check it with.
        SystemExit: with status 1, if a requirement is violated.
    """
    if {"-h", "--help"} & set(argv):
        print(_HELP, end="")
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
    plugins.check_classes(config)
    try:
        task, same, _ = (plugins.import_class(name) for name in (path, configured["model"], configured["data"]))
    except (Exception, SystemExit) as error:  # any exception of the package's own code
        _print("FAIL", "import", f"{path}: {type(error).__name__}: {error}. Mend it, or install what it needs")
        sys.exit(1)
    if same is not task:
        raise ValueError(
            f"{files[-1]} is an experiment with {configured['model']}, not with {path}: name another by -c"
        )
    print(f"{path}, as in {files[-1]}; contract version {PROTOCOL_VERSION}")
    failed = False
    for _, finding in check([config]):
        failed |= finding.status == "FAIL"
        _print(finding.status, finding.what, finding.text)
    print(f"{'not every promise is kept' if failed else 'every promise is kept'} ({time.monotonic() - start:.0f} s)")
    if failed:
        sys.exit(1)


def _task_and_experiment(name: str, files: list[str]) -> tuple[str, list[str]]:
    """Return the import path of the requested task, and the experiment to check it with."""
    task = plugins.find_task(name)
    if task is None and "." not in name:
        known = ", ".join(dict.fromkeys(task.name for task in plugins.installed_tasks()))
        raise ValueError(
            f"no task {name!r} is installed; there are {known}; or give an import path, package.module.Class"
        )
    shipped = plugins.experiment_of(task) if task is not None else None
    if not files and shipped is None:
        raise ValueError(f"the package of {name} ships no experiment to check it by: name one with -c EXPERIMENT.yaml")
    return (task.path if task is not None else name), files or [str(shipped)]


def _class_path(config: Config, key: str, file: str) -> str:
    block = config.get(key)
    if isinstance(block, str):
        block = config[key] = {"class_path": block}
    if not isinstance(block, dict) or "class_path" not in block:
        raise ValueError(f"{file} names no class for {key}: add {key}: {{class_path: package.module.Class}}")
    return str(block["class_path"])


def _print(status: str, what: str, text: str) -> None:
    print(f"{status:4} {what:13} {text}", flush=True)


def check(plans: Sequence[Config]) -> Iterator[tuple[int, Finding]]:
    """Check the task of each plan, all with one pair of processes.

    Args:
        plans: merged config of an experiment each.

    Yields:
        Findings as they occur, each with the number of its plan.
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
            names = [str(number) for number in range(len(plans))]
            contracts = [ConformanceSuite(config, folder / name) for name, config in zip(names, plans, strict=True)]
            (folder / "plans.json").write_text(json.dumps(names))
            with _two_processes(folder):
                for number, contract in enumerate(contracts):
                    yield from ((number, finding) for finding in contract.on_one_process())
                for number, contract in enumerate(contracts):
                    yield from ((number, finding) for finding in contract.on_two_processes())
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _two_processes(folder: Path) -> Iterator[None]:
    """Start two processes, which import their modules while the runs of one process continue."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with open(folder / "output", "w+") as output:
        command = [*launch, "bigmodel.testing.worker", str(folder), str(os.getpid())]
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

        def tell() -> None:
            process.wait()
            lines = (folder / "output").read_text(errors="replace").splitlines() or ["they said nothing"]
            (folder / "ended").write_text(next((line for line in reversed(lines) if "Error" in line), lines[-1]))

        watcher = threading.Thread(target=tell, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            process.terminate()  # torchrun terminates its workers
            watcher.join()
