"""Rendezvous of a launch's processes before they connect: missing or differing ones are reported within a minute.

torch's `init_process_group` waits for half an hour, then reports how many processes are missing, but not which ones, and
compares neither versions nor settings (tests/parallel/test_rendezvous.py); `monitored_barrier` needs a connected group.
Here the first process serves a store of keys at MASTER_ADDR:MASTER_PORT (under torchrun, its agent does), in which all
processes register with the facts that must be equal: versions, kind of device, resolved configuration. Then the strategy
connects them, at the same address. It happens once per fit, validate, test or predict, and takes a fraction of a second.

A process stops waiting when no other process has registered for BIGMODEL_RENDEZVOUS_SECONDS (an environment variable;
60): set more if nodes start slowly. The agents of torchrun connect before that, at --rdzv-endpoint, with a limit of
their own (`--rdzv-conf join_timeout=60`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import platform
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from bigmodel import __version__
from bigmodel.internals import start_method

_SECONDS = "BIGMODEL_RENDEZVOUS_SECONDS"
_POLL = 0.2  # seconds
_EXIT_DELAY = 2.0  # seconds between the exit of the rank that reports the error and that of the others
_SECONDS_BEFORE_NOTICE = 10.0  # of waiting, before a line is printed
_MOST_LINES, _MOST_CHARACTERS = 20, 40  # in a table of differences, and in a value of it
_numbers = itertools.count()  # one rendezvous per verb that the processes run


def check_strategy(strategy: Any) -> None:
    """Raise for strategies that are not supported.

    Raises:
        ValueError: for FSDP1, which needs CUDA and cannot clip by norm, and for spawned processes.
    """
    name = strategy.lower() if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, FSDPStrategy) or name.startswith("fsdp"):
        raise ValueError(
            f"--trainer.strategy {name}: this is FSDP1, which cannot clip gradients by their norm and needs CUDA; use FSDP2,"
            " -c experiments/hardware/fsdp.yaml"
        )
    if "spawn" in name or start_method(strategy) in ("spawn", "forkserver"):
        raise ValueError(
            f"--trainer.strategy {name}: spawned processes cannot take over a run that is set up in this process; set"
            " --trainer.strategy ddp, which starts the command again for each process"
        )


def check_world_size(trainer: Trainer) -> None:
    """Compare the number of processes started by a launcher with the number that the trainer expects.

    Raises:
        ValueError: if they differ, or this process is beyond the last node or device.
    """
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return  # Lightning or SLURM starts the processes, and Lightning checks their number
    started, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    devices = trainer.num_devices  # per node; trainer.world_size is the launcher's value
    wanted = devices * trainer.num_nodes
    have = f"--trainer.devices {devices} x --trainer.num_nodes {trainer.num_nodes} = {wanted}"
    if started != wanted:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", started))
        alone = " (each would train alone)" if wanted == 1 else ""
        raise ValueError(
            f"the launcher has started {started} processes (WORLD_SIZE), and {have}{alone}: set --trainer.devices"
            f" {local_size} --trainer.num_nodes {started // local_size} and a strategy for several processes"
            f" (-c experiments/hardware/ddp.yaml), or launch {wanted} processes"
        )
    node = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
    if node >= trainer.num_nodes or local >= devices:
        raise ValueError(
            f"this is process {local} of node {node}, counted from 0, and {have}: launch {devices} processes on each of"
            f" {trainer.num_nodes} nodes, or set these flags"
        )


def install_rendezvous(trainer: Trainer, config: Mapping[str, Any]) -> None:
    """Run the rendezvous just before the trainer's strategy connects its processes. Does nothing for one process.

    Args:
        trainer: the trainer that is about to fit or evaluate.
        config: the resolved configuration, plain values, which must be the same in all processes.
    """
    if not isinstance(trainer.strategy, DDPStrategy | ModelParallelStrategy):
        return
    strategy: Any = trainer.strategy
    connect = strategy.setup_environment
    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "bigmodel": __version__,
        "device": type(trainer.accelerator).__name__.removesuffix("Accelerator"),
        **_flags(config),
    }

    def rendezvous_and_connect() -> None:
        strategy.set_world_ranks()
        store = None
        if strategy.world_size > 1:
            at = strategy.cluster_environment
            store = rendezvous(at.main_address, at.main_port, strategy.global_rank, strategy.world_size, facts)
        connect()
        del store  # not earlier: in the first process it is the server, which the strategy now also holds

    strategy.setup_environment = rendezvous_and_connect


def rendezvous(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    facts: Mapping[str, str],
    *,
    seconds: float | None = None,
    name: str | None = None,
) -> Store:
    """Wait until all processes have registered, and check that their facts are equal.

    Args:
        host, port: the address at which the first process serves the store.
        rank: of this process.
        world_size: the number of processes.
        facts: values that must be the same for all, by name.
        seconds: how long to wait for one more process; None: BIGMODEL_RENDEZVOUS_SECONDS.
        name: of this rendezvous; None: its number.

    Returns:
        The store; in the first process it is also the server, which ends with it.

    Raises:
        ValueError: if the address does not answer, processes are missing, or their facts differ. The first registered
            process reports the error, the others refer to it.
    """
    seconds = _limit() if seconds is None else seconds
    where = f"{host}:{port}"
    name = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_numbers)}" if name is None else name
    store = PrefixStore(f"bigmodel/{name}", _connect(host, port, rank, world_size, seconds))
    own = json.dumps({"node": platform.node(), **facts})
    alike = "alike/" + hashlib.sha256(json.dumps(dict(facts)).encode()).hexdigest()
    try:
        if store.add(f"taken/{rank}", 1) > 1:
            raise ValueError(
                f"another process {rank} has registered at {where}, maybe of another run: set another MASTER_PORT"
            )
        store.set(f"facts/{rank}", own)
        store.add(alike, 1)
        present = _wait_for_all(store, where, rank, world_size, seconds)
        if len(present) == world_size and store.add(alike, 0) == world_size:
            return store
        processes = [{"rank": r, **json.loads(store.get(f"facts/{r}"))} for r in present]
        _exit_after_reporting(store, rank == present[0], len(present))
    except DistError as error:
        raise ValueError(
            f"process {rank} has lost the store at {where}, which the first process serves ({_first_line(error)}): see the"
            " output of process 0"
        ) from error
    raise ValueError(_failure(processes, rank, world_size, where, seconds))


def _failure(processes: list[dict[str, Any]], rank: int, world_size: int, where: str, seconds: float) -> str:
    """Describe, for this rank, which processes are missing or differ; `processes` as for `diff_ranks`."""
    present = [process["rank"] for process in processes]
    if rank != present[0]:
        return f"process {rank} stops because of an error in the launch: see the output of process {present[0]}"
    if len(present) < world_size:
        return (
            f"{world_size - len(present)} of {world_size} processes have not registered at {where} within {seconds:g} s:"
            f" missing {_ranks(set(range(world_size)) - set(present))}; registered {_places(processes)}. See the output of"
            f" the missing ones; if they start slowly, set {_SECONDS} above {seconds:g}"
        )
    return (
        f"the {world_size} processes differ; all must have the same versions and the same configuration:\n"
        + diff_ranks(processes)
    )


def diff_ranks(processes: list[dict[str, Any]]) -> str:
    """Format a table of the facts that differ, a line for each value with its ranks.

    Args:
        processes: each process's facts by name, with its `rank` and `node`.
    """
    names = dict.fromkeys(key for process in processes for key in process if key not in ("rank", "node"))
    lines = []
    for name in names:
        holders: dict[str, list[dict[str, Any]]] = {}
        for one in processes:
            holders.setdefault(one.get(name, "not set"), []).append(one)
        if len(holders) > 1:
            for i, (value, who) in enumerate(holders.items()):
                short = value if len(value) <= _MOST_CHARACTERS else value[: _MOST_CHARACTERS - 3] + "..."
                lines.append(f"  {'' if i else name:30} {short:{_MOST_CHARACTERS}} {_places(who)}")
    more = len(lines) - _MOST_LINES
    return "\n".join(lines[:_MOST_LINES] + ([f"  and {more} more lines"] if more > 0 else []))


def _limit() -> float:
    text = os.environ.get(_SECONDS, "60")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{_SECONDS}={text}: a number of seconds above 0 is accepted")
    return seconds


def _flags(config: Any, key: str = "-") -> dict[str, str]:
    """Return a configuration's values as flags, such as `--data.batch_size: 12`."""
    if isinstance(config, Mapping) and config:
        inner = {name: f"{key}.{name}" if key != "-" else f"--{name}" for name in config}
        return {flag: text for name in config for flag, text in _flags(config[name], inner[name]).items()}
    return {key.replace(".init_args", ""): json.dumps(config, default=str)}  # as typed on the command line


def _connect(host: str, port: int, rank: int, world_size: int, seconds: float) -> TCPStore:
    """Return the store at this address, created by the first process."""
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_for_port(host, port, rank, world_size, seconds)
    found: list[TCPStore] = []
    failed: list[Exception] = []

    def connect() -> None:
        try:
            limit = timedelta(seconds=seconds)
            found.append(TCPStore(host, port, None, serves, limit, wait_for_workers=False, multi_tenant=True))
        except Exception as error:
            failed.append(error)

    # In a thread, because PyTorch waits forever if another program listens there.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    if found:
        return found[0]
    reason = _first_line(failed[0]) if failed else "it does not answer as torch's store does"
    what = "cannot listen at" if serves else "cannot use the program that listens at"
    raise ValueError(
        f"process {rank} {what} {host}:{port} (MASTER_ADDR:MASTER_PORT): {reason}. Set MASTER_ADDR to an address of the node"
        " of process 0, and MASTER_PORT to a port that is free there"
    )


def _wait_for_port(host: str, port: int, rank: int, world_size: int, seconds: float) -> None:
    """Wait until the port is open, without output (torch prints a trace for each attempt)."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = max(_POLL, deadline - time.monotonic())
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"process {rank} of {world_size} cannot reach process 0 at {host}:{port} (MASTER_ADDR:MASTER_PORT)"
                    f" within {seconds:g} s: {error}. Check that process 0 runs, that this is the address of its node, and"
                    f" that no firewall blocks the port; if it starts slowly, set {_SECONDS} above {seconds:g}"
                ) from error
        time.sleep(_POLL)


def _wait_for_all(store: Store, where: str, rank: int, world_size: int, seconds: float) -> list[int]:
    """Return the registered ranks: all, unless no other process has registered for `seconds`."""
    here = store.add("came", 1)
    start = latest = time.monotonic()
    printed = rank != 0
    while here < world_size and time.monotonic() - latest < seconds:
        time.sleep(_POLL)
        now = store.add("came", 0)
        if now > here:
            here, latest = now, time.monotonic()
        if not printed and time.monotonic() - start > _SECONDS_BEFORE_NOTICE:
            print(f"waiting    at {where} for {world_size - here} of {world_size} processes", flush=True)
            printed = True
    if here >= world_size:
        return list(range(world_size))
    return [r for r in range(world_size) if store.check([f"facts/{r}"])]


def _exit_after_reporting(store: Store, reports: bool, num_present: int) -> None:
    """Make the rank that reports the error exit first, because the launcher kills all ranks when one exits.

    It waits until the other ranks have read the store, which it may serve.
    """
    gone, start = store.add("gone", 0 if reports else 1), time.monotonic()
    if not reports:
        time.sleep(_EXIT_DELAY)
    while reports and gone < num_present - 1 and time.monotonic() - start < _EXIT_DELAY:
        time.sleep(_POLL / 4)
        gone = store.add("gone", 0)


def _places(processes: list[dict[str, Any]]) -> str:
    """Format ranks by node, as `ranks 0-3 on node-1, ranks 4-7 on node-2`."""
    nodes: dict[str, list[int]] = {}
    for one in processes:
        nodes.setdefault(one["node"], []).append(one["rank"])
    return ", ".join(f"{_ranks(ranks)} on {node}" for node, ranks in nodes.items())


def _ranks(numbers: Iterable[int]) -> str:
    """Format numbers with ranges, as `ranks 0-3, 6`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"rank{'s' if sum(map(len, runs)) > 1 else ''} {text}"


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(". ")
