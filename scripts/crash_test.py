"""Kill training with SIGKILL again and again, resume it each time, and compare the end with a run left alone.

    python scripts/crash_test.py [--kills 100] [--tasks language_modeling image_classification recommendation outsider]
                                 [--processes 1 | --layouts] [--seed 0]

Each task is a tiny experiment of some seconds with dropout, EMA, accumulation, validation in mid-epoch and a checkpoint
every few steps. It is run once straight, by the command in a process of its own; then it is started, killed and resumed
until it is finished, and that again until the task has had its share of kills. Half of the kills come while a checkpoint is
being written, one in ten while the command starts, the rest anywhere. Weights, average and optimizer state of the last
checkpoint, weights of the best one, and all of metrics.csv but the speeds must then be those of the straight run, bit by
bit. The exit status is 1 if anything differs.

With --layouts, each session has another layout than the one before, drawn at random: one process or several (`LAYOUTS`).
The straight run has the first of them. Each optimizer step must take the same samples as there; weights and average must
be the same within 2e-6, and cannot be so bit by bit: another number of processes adds the same gradients in another order.
For that, training is in float32, by SGD (Adam makes much of a rounding error where a gradient is nearly 0), and without
dropout, which each process draws for itself.

Importing Lightning takes longer than the training here, so the sessions that are killed are forked from this process, which
has imported everything and started no thread; that the straight run is not shows that forking changes no bit.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from crash_compare import compare_bitwise, compare_layouts

ROOT = Path(__file__).resolve().parents[1]
OUTSIDER = ROOT / "tests" / "outsider"
PATHS = (ROOT, OUTSIDER, ROOT / "scripts")
# Set before numpy and torch are imported: a process that has threads cannot be forked safely.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator
    "WANDB_MODE": "disabled",
}
MODULES = (
    "torch",
    "bigmodel.cli.trainer_cli",
    "crash_samples",
)
STEPS = 60  # optimizer steps of each run
TASKS = ("language_modeling", "image_classification", "recommendation", "outsider")


class Layout(NamedTuple):
    """How a session is spread out: words for `bigmodel fit`, which must undo those of any other layout."""

    name: str
    processes: int
    flags: tuple[str, ...]


def several(processes: int) -> Layout:
    """So many processes, each with a whole copy of the net."""
    strategy = "ddp" if processes > 1 else "auto"
    return Layout(str(processes), processes, ("--trainer.devices", str(processes), "--trainer.strategy", strategy))


SHARDED = ("--trainer.devices", "2", "--trainer.strategy", "bigmodel.parallel.ShardedStrategy")
LAYOUTS = (several(1), several(2), Layout("2 sharded", 2, SHARDED))  # the first is that of the straight run
COMMON = {
    "experiment": "crash", "callbacks.progress": "null", "callbacks.ema": "bigmodel.training.callbacks.EMA",
    "callbacks.ema.decay": 0.9, "callbacks.last.every_n_steps": 3, "callbacks.last.every_n_minutes": "null",
    "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 4, "trainer.max_epochs": "null",
    "trainer.check_val_every_n_epoch": "null",
}  # fmt: skip
OWN: dict[str, tuple[Path, dict[str, Any]]] = {
    "language_modeling": (
        ROOT / "experiments" / "language_modeling" / "stdlib.yaml",
        {
            "model.net.width": 64, "model.net.depth": 2, "model.net.num_heads": 2, "model.net.dropout": 0.1,
            "data.path": "{stdlib}/email", "data.tokenizer.vocab_size": 300, "data.split.val": 0.2,
            "data.context_length": 64, "data.batch_size": 16, "data.micro_batch_size": 4, "trainer.max_steps": STEPS,
            "trainer.val_check_interval": 7, "trainer.limit_val_batches": 3, "callbacks.samples": "null",
        },
    ),
    "image_classification": (
        ROOT / "experiments" / "image_classification" / "digits.yaml",
        {
            "model.net": "bigmodel.nn.ViT", "model.net.patch_size": 4, "model.net.width": 32, "model.net.depth": 2,
            "model.net.num_heads": 2, "model.net.dropout": 0.1, "model.net.drop_path": 0.1, "data.batch_size": 64,
            "data.micro_batch_size": 16, "trainer.max_steps": STEPS, "trainer.val_check_interval": 7,
        },
    ),
    "recommendation": (
        ROOT / "experiments" / "recommendation" / "check.yaml",
        {
            "model.num_eval_negatives": 8, "data.path": "events.csv", "data.filters": "null", "data.batch_size": 16,
            "data.micro_batch_size": 4, "trainer.max_steps": STEPS, "trainer.val_check_interval": 7,
        },
    ),
    "outsider": (
        OUTSIDER / "experiment.yaml",
        {
            "model.net.dropout": 0.2, "data.path": "table.csv", "data.batch_size": 12, "data.micro_batch_size": 3,
            "trainer.max_steps": STEPS, "trainer.val_check_interval": 4,
        },
    ),
}  # fmt: skip


# What a comparison of layouts needs besides.
ROUNDING_ONLY: dict[str, Any] = {
    "trainer.precision": "32-true", "model.optimizer": "torch.optim.SGD", "model.optimizer.lr": 0.05,
    "model.net.dropout": 0.0,
}  # fmt: skip


def words(task: str, runs_dir: str, across_layouts: bool) -> list[str]:
    """Return the flags of `bigmodel fit`, except those of the layout."""
    path, own = OWN[task]
    settings = {**COMMON, **own, "runs_dir": runs_dir}
    if across_layouts:
        settings |= ROUNDING_ONLY | ({"model.net.drop_path": 0.0} if "model.net.drop_path" in own else {})
    if task != "outsider":
        settings["data.cache_dir"] = "cache"
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return ["-c", str(path), *flags]


def write_table() -> None:
    """A hundred rows y = a b for the outsider."""
    draw = random.Random(0)
    with open("table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "y"])
        for _ in range(100):
            a, b = draw.random(), draw.random()
            writer.writerow([a, b, a * b])


def write_events() -> None:
    """Fifty people who chose some of thirty items each."""
    draw = random.Random(0)
    with open("events.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "item_id", "timestamp"])
        for user in range(50):
            for second, item in enumerate(draw.sample(range(30), draw.randint(5, 20))):
                writer.writerow([user, item, second])


def rank_variables(processes: int) -> list[dict[str, str]]:
    """Return the environment variables of torchrun for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "NODE_RANK": "0"}
    return [{**common, "LOCAL_RANK": str(rank), "RANK": str(rank)} for rank in range(processes)]


def record(runs_dir: str, session: int) -> list[str]:
    """Flags that write down a session's samples."""
    return ["--callbacks.taken", "crash_samples.Samples", "--callbacks.taken.path", f"{runs_dir}.samples/{session}"]


def run_straight(task: str, layout: Layout, across_layouts: bool) -> list[subprocess.Popen[bytes]]:
    """Start a run in fresh processes that nobody will kill."""
    runs_dir = f"{task}/straight"
    command = [sys.executable, "-m", "bigmodel", "fit", *words(task, runs_dir, across_layouts), *layout.flags]
    command += record(runs_dir, 1) if across_layouts else []
    environments = rank_variables(layout.processes) if layout.processes > 1 else [{}]
    path = os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])
    Path(task).mkdir(exist_ok=True)
    with open(f"{task}/straight.log", "ab") as log:
        return [
            subprocess.Popen(command, env={**os.environ, **more, "PYTHONPATH": path}, stdout=log, stderr=log)
            for more in environments
        ]


def fork_session(argv: list[str], log: Path, processes: int) -> int:
    """Fork a process group in which `bigmodel` runs with these words; the number of the group and of its first process."""
    variables = rank_variables(processes) if processes > 1 else []
    leader = os.fork()
    if leader:
        return leader
    status = 1
    try:
        os.setsid()
        rank = next((rank for rank in range(1, processes) if os.fork() == 0), 0)
        os.environ.update(variables[rank] if variables else {})
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from bigmodel.cli import main

        main(argv)
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def names(runs_dir: Path) -> set[str]:
    """Names in the folder of checkpoints, those that are being written included."""
    return {entry.name for folder in runs_dir.glob("crash/*/checkpoints") for entry in os.scandir(folder)}


def wait_for_death(leader: int, runs_dir: Path, draw: random.Random) -> int | None:
    """Let a session run to a random moment and kill it; its exit status, if it was finished before."""
    aim, writes = draw.random(), draw.randint(0, 6)
    delay = draw.uniform(0, 2.0) if aim < 0.1 else draw.uniform(0, 0.1)
    before = names(runs_dir)
    trigger: float | None = time.monotonic() + delay if aim < 0.1 else None
    while True:
        ended, status = os.waitpid(leader, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if trigger is None:
            new = names(runs_dir) - before
            before |= {name for name in new if name.endswith(".ckpt")}
            writes -= sum(name.endswith(".ckpt") for name in new)
            if aim < 0.6 and writes <= 0 and any(name.endswith(".partial") for name in new):
                trigger = 0.0
            elif aim >= 0.6 and writes <= 0:
                trigger = time.monotonic() + delay
        elif time.monotonic() >= trigger:
            with suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
            _, status = os.waitpid(leader, 0)
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGKILL else code


class Tally(NamedTuple):
    """Results of a task; `changes`: resumes on another layout; `largest`: difference of a weight."""

    task: str
    runs: int
    kills: int
    in_a_write: int
    resumes: int
    changes: int
    compared: int
    differing: int
    largest: float
    seconds: float


def torture(task: str, kills: int, layouts: tuple[Layout, ...], draw: random.Random) -> Tally:
    """Kill and resume runs of a task until it had so many kills, and compare each with the straight one."""
    from bigmodel.run import checkpoint_step

    start, across = time.monotonic(), len(layouts) > 1
    runs = killed = torn = resumes = changes = compared = differing = 0
    largest = 0.0
    while killed < kills:
        runs += 1
        runs_dir = Path(task, f"crashed-{runs}")
        log = Path(task, f"crashed-{runs}.log")
        layout: Layout | None = None
        session = 0
        while True:
            (directory,) = [path.parent for path in runs_dir.glob("crash/*/run.json")] or [None]
            resumable = directory is not None and any(directory.glob("checkpoints/*.ckpt"))
            if not resumable:  # killed before its first checkpoint: to be started anew
                shutil.rmtree(runs_dir, ignore_errors=True)
            before, session = layout, session + 1
            layout = draw.choice([one for one in layouts if one != before] or layouts)
            resumes += resumable
            changes += resumable and layout != before
            argv = ["--resume", str(directory)] if resumable else words(task, str(runs_dir), across)
            argv += [*layout.flags, *(record(str(runs_dir), session) if across else [])]
            names_before = names(runs_dir)
            leader = fork_session(["fit", *argv], log, layout.processes)
            if killed >= kills:
                status: int | None = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
            else:
                status = wait_for_death(leader, runs_dir, draw)
            if status == 0:
                break
            if status is not None:
                raise SystemExit(f"a session ended with status {status}:\n{log.read_text()[-3000:]}")
            killed += 1
            written = names(runs_dir)
            partial = any(name.endswith(".partial") for name in written - names_before)
            torn += partial
            step = max((checkpoint_step(Path(name)) for name in written if name.endswith(".ckpt")), default=-1)
            reached = f"checkpoint of step {step}" if step >= 0 else "no checkpoint yet"
            reached += ", while one was being written" if partial else ""
            print(f"{task}  kill {killed}  {reached}{f'; layout {layout.name}' if across else ''}", flush=True)
            if step == STEPS:  # all steps are taken, and a resume would be refused
                break
        (directory,) = [path.parent for path in runs_dir.glob("crash/*/run.json")]
        (straight,) = [path.parent for path in Path(task, "straight").glob("crash/*/run.json")]
        compare = compare_layouts if across else compare_bitwise
        found = compare(straight, directory, killed_at_end=status is None)
        compared, differing = compared + found.compared, differing + len(found.differing)
        largest = max(largest, found.largest)
        for name in found.differing[:20]:
            print(f"{task}  run {runs}  DIFFERS: {name}", flush=True)
    seconds = time.monotonic() - start
    return Tally(task, runs, killed, torn, resumes, changes, compared, differing, largest, seconds)


def print_table(tallies: list[Tally]) -> None:
    """A line for each task."""
    heads = [name.replace("_", " ") for name in Tally._fields]
    widths = [20, *(len(head) + 2 for head in heads[1:])]
    print("\n" + "".join(f"{head:{'<' if i == 0 else '>'}{widths[i]}}" for i, head in enumerate(heads)))
    for tally in tallies:
        texts = [f"{value:.1g}" if isinstance(value, float) else str(value) for value in tally[1:-1]]
        texts = [tally.task, *texts, f"{tally.seconds:.0f}"]
        print("".join(f"{text:{'<' if i == 0 else '>'}{widths[i]}}" for i, text in enumerate(texts)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, dealt out to the tasks")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--processes", type=int, default=1, help="of each run (gloo)")
    how.add_argument("--layouts", action="store_true", help="resume on another number of processes each time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")
    given = parser.parse_args()
    layouts = LAYOUTS if given.layouts else (several(given.processes),)
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_table()
        write_events()
        straight = {task: run_straight(task, layouts[0], given.layouts) for task in given.tasks}
        sys.path[:0] = map(str, PATHS)
        own = ["outsider" if task == "outsider" else f"bigmodel.tasks.{task}" for task in given.tasks]
        for module in (*MODULES, *own):
            importlib.import_module(module)
        num_threads = len(os.listdir("/proc/self/task"))
        if num_threads > 1:
            raise SystemExit(f"this process has {num_threads} threads after its imports: forking it would not be safe")
        for task, processes in straight.items():
            if any(process.wait() for process in processes):
                raise SystemExit(f"the straight run failed:\n{Path(task, 'straight.log').read_text()[-3000:]}")
        tallies = []
        for i, task in enumerate(given.tasks):
            share = given.kills * (i + 1) // len(given.tasks) - given.kills * i // len(given.tasks)
            tallies.append(torture(task, share, layouts, random.Random(f"{given.seed} {task}")))
        os.chdir(ROOT)
    print_table(tallies)
    return 1 if any(tally.differing for tally in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
