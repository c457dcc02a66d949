"""Rendezvous of a launch's processes before they connect: missing or differing ones are named within a minute.

PyTorch waits half an hour for a missing process, and does not report which one is missing. Here the first process
serves a store of keys at MASTER_ADDR:MASTER_PORT (under torchrun, its agent does), in which all processes register with
the facts that must be the same for all of them: versions, kind of device, resolved configuration. Only then does the
strategy connect them, at the same address. It happens once per fit, validate, test or predict, and takes a fraction of
a second.

A process stops waiting when no further process has registered for BIGMODEL_RENDEZVOUS_SECONDS (an environment variable;
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
_COURTESY = 2.0  # seconds between the exit of the rank that reports the error and that of the others
_SAY_AFTER = 10.0  # seconds of waiting before a line is printed
_MOST_LINES, _MOST_CHARACTERS = 20, 40  # in a table of differences, and in a value of it
_meetings = itertools.count()  # one rendezvous per verb that the processes run


def check_strategy(strategy: Any) -> None:
    """Raise for strategies that are not supported.

    Raises:
        ValueError: for FSDP1, which needs CUDA and cannot clip by norm, and for spawned processes.
    """
    name = strategy.lower() if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, FSDPStrategy) or name.startswith("fsdp"):
        raise ValueError(
            f"--trainer.strategy {name}: this is FSDP1, which cannot clip gradients by their norm nor run on a CPU; shard"
            " with FSDP2: -c experiments/hardware/fsdp.yaml"
        )
    if "spawn" in name or start_method(strategy) in ("spawn", "forkserver"):
        raise ValueError(
            f"--trainer.strategy {name}: a run that was set up here cannot be handed over to processes that are spawned;"
            " set --trainer.strategy ddp, which starts the command again for each process"
        )


def check_world_size(trainer: Trainer) -> None:
    """Compare the number of processes started by a launcher with the number that the trainer expects.

    Raises:
        ValueError: if they differ, or this process is beyond the last node or device.
    """
    if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return  # Lightning starts the others itself, or SLURM does, and Lightning checks the number of tasks
    started, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    devices = trainer.num_devices  # per node; trainer.world_size is the launcher's value
    wanted = devices * trainer.num_nodes
    have = f"--trainer.devices {devices} x --trainer.num_nodes {trainer.num_nodes} = {wanted}"
    if started != wanted:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", started))
        alone = " (each would train alone)" if wanted == 1 else ""
        raise ValueError(
            f"the launcher has started {started} processes (WORLD_SIZE), and the trainer counts on {have}{alone}: set"
            f" --trainer.devices {local_size} --trainer.num_nodes {started // local_size} and a strategy for several"
            " processes (-c experiments/hardware/ddp.yaml), or launch as many processes"
        )
    node = int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", 0)))
    if node >= trainer.num_nodes or local >= devices:
        raise ValueError(
            f"this is process {local} of node {node}, counted from 0, and the trainer counts on {have}: launch as many"
            " processes on each node, or set these flags"
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

    def meet_and_connect() -> None:
        strategy.set_world_ranks()
        store = None
        if strategy.world_size > 1:
            at = strategy.cluster_environment
            store = rendezvous(at.main_address, at.main_port, strategy.global_rank, strategy.world_size, facts)
        connect()
        del store  # not earlier: in the first process it is the server, which the strategy now also holds

    strategy.setup_environment = meet_and_connect


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
        seconds: how long to wait for a further process; None: see the head of this module.
        name: of this rendezvous; None: they are numbered.

    Returns:
        The store; in the first process it is also the server, which ends with it.

    Raises:
        ValueError: if nothing listens there, processes are missing, or they differ. The first registered one reports
            the error, the others refer to it.
    """
    seconds = _limit() if seconds is None else seconds
    where = f"{host}:{port}"
    name = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}" if name is None else name
    store = PrefixStore(f"bigmodel/{name}", _connect(host, port, rank, world_size, seconds))
    me = json.dumps({"node": platform.node(), **facts})
    alike = "alike/" + hashlib.sha256(json.dumps(dict(facts)).encode()).hexdigest()
    try:
        if store.add(f"taken/{rank}", 1) > 1:
            raise ValueError(
                f"there is another process {rank} at {where}: does another run use this address? Set another MASTER_PORT"
            )
        store.set(f"facts/{rank}", me)
        store.add(alike, 1)
        came = _wait_for_all(store, where, rank, world_size, seconds)
        if len(came) == world_size and store.add(alike, 0) == world_size:
            return store
        everybody = [{"rank": r, **json.loads(store.get(f"facts/{r}"))} for r in came]
        _exit_after_reporting(store, rank == came[0], len(came))
    except DistError as error:
        raise ValueError(
            f"process {rank} has lost the store at {where}, which the first process serves ({_first_line(error)}): look at"
            " that one's output"
        ) from error
    if rank != came[0]:
        raise ValueError(f"process {rank} stops with the others: process {came[0]} says why")
    if len(came) < world_size:
        raise ValueError(
            f"{world_size - len(came)} of {world_size} processes did not come to {where} within {seconds:g} s: missing"
            f" {_ranks(set(range(world_size)) - set(came))}; here {_places(everybody)}. Look at the output of those that are"
            f" missing; {_SECONDS}={seconds:g} is how long to wait for one more"
        )
    raise ValueError(
        f"the {world_size} processes are not alike; all need the same versions and the same configuration:\n"
        + diff_ranks(everybody)
    )


def diff_ranks(everybody: list[dict[str, Any]]) -> str:
    """Format a table of the facts that differ, a line for each value with its ranks.

    Args:
        everybody: each process's facts by name, with its `rank` and `node`.
    """
    names = dict.fromkeys(key for one in everybody for key in one if key not in ("rank", "node"))
    lines = []
    for name in names:
        holders: dict[str, list[dict[str, Any]]] = {}
        for one in everybody:
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
        raise ValueError(f"{_SECONDS}={text}: it is how many seconds to wait for other processes, more than 0")
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
    why = _first_line(failed[0]) if failed else "it does not answer as PyTorch's store would"
    what = "cannot serve the others at" if serves else "cannot use what listens at"
    raise ValueError(
        f"process {rank} {what} {host}:{port} (MASTER_ADDR:MASTER_PORT): {why}. MASTER_ADDR is to be an address of the node"
        " of process 0, and MASTER_PORT a port that is free there"
    )


def _wait_for_port(host: str, port: int, rank: int, world_size: int, seconds: float) -> None:
    """Wait until the port is open; silently, whereas PyTorch prints a trace for each attempt."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = max(_POLL, deadline - time.monotonic())
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"process {rank} of {world_size} found nobody at {host}:{port} (MASTER_ADDR:MASTER_PORT) within"
                    f" {seconds:g} s: {error}. Process 0 serves there: does it run, is this the address of its node, and do"
                    f" firewalls let the port through? {_SECONDS}={seconds:g} is how long to wait for a slow start"
                ) from error
        time.sleep(_POLL)


def _wait_for_all(store: Store, where: str, rank: int, world_size: int, seconds: float) -> list[int]:
    """Return the registered ranks: all, unless no further one has registered for `seconds`."""
    here = store.add("came", 1)
    start = latest = time.monotonic()
    said = rank != 0
    while here < world_size and time.monotonic() - latest < seconds:
        time.sleep(_POLL)
        now = store.add("came", 0)
        if now > here:
            here, latest = now, time.monotonic()
        if not said and time.monotonic() - start > _SAY_AFTER:
            print(f"waiting    at {where} for {world_size - here} of {world_size} processes", flush=True)
            said = True
    if here >= world_size:
        return list(range(world_size))
    return [r for r in range(world_size) if store.check([f"facts/{r}"])]


def _exit_after_reporting(store: Store, speaks: bool, came: int) -> None:
    """Make the rank that reports the error exit first, because the launcher kills all ranks when one exits.

    It waits until the others have read the store, which it may serve.
    """
    gone, start = store.add("gone", 0 if speaks else 1), time.monotonic()
    if not speaks:
        time.sleep(_COURTESY)
    while speaks and gone < came - 1 and time.monotonic() - start < _COURTESY:
        time.sleep(_POLL / 4)
        gone = store.add("gone", 0)


def _places(who: list[dict[str, Any]]) -> str:
    """Format ranks by node, as `ranks 0-3 on node-1, ranks 4-7 on node-2`."""
    nodes: dict[str, list[int]] = {}
    for one in who:
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
