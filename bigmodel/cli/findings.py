"""Findings of `bigmodel check`, and checks of a single moment of the run: processes, memory, a checkpoint."""

from __future__ import annotations

import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from bigmodel import run
from bigmodel.checkpoint import read, size_on_disk
from bigmodel.cli.formatting import find_differences, format_bytes
from bigmodel.data.text import print_text
from bigmodel.parallel.tensors import local

_MAX_REDUCED = 1 << 24  # float32 numbers in the sum over processes, 64 MB: a typical part of a net's gradients


class Findings:
    """Prints findings as they occur.

    Args:
        prints: false on all processes but the first.

    Attributes:
        failed: True if any of them was a failure.
    """

    def __init__(self, prints: bool) -> None:
        self.prints, self.failed = prints, False

    def ok(self, name: str, text: str) -> None:
        """Print a successful finding."""
        if self.prints:
            print_text(f"ok   {name:12} {text}", flush=True)

    def fail(self, name: str, text: str) -> None:
        """Print a failure; the text includes a remedy."""
        self.failed = True
        if self.prints:
            print_text(f"FAIL {name}: {text}", flush=True)


def check_processes(findings: Findings, pl_module: LightningModule) -> None:
    """Check a sum over processes; `bigmodel.parallel.rendezvous` has compared their software."""
    hosts = gather(platform.node())
    size = min(_MAX_REDUCED, sum(p.numel() for p in pl_module.parameters()))
    numbers = torch.ones(size, device=pl_module.device)
    torch.distributed.all_reduce(numbers)  # the first one sets up connections
    numbers.fill_(torch.distributed.get_rank() + 1)
    synchronize(pl_module.device)
    start = time.perf_counter()
    torch.distributed.all_reduce(numbers)
    synchronize(pl_module.device)
    seconds, world = time.perf_counter() - start, len(hosts)
    correct = all(gather(bool((numbers == world * (world + 1) / 2).all())))
    nodes = len(set(hosts))
    tested = f"{world} on {nodes} node{'s' if nodes > 1 else ''}; the sum of {format_bytes(4 * size)} over them"
    if correct:
        findings.ok("processes", f"{tested} is correct, in {1e3 * seconds:.1f} ms")
    else:
        findings.fail("processes", f"{tested} is wrong: the network between them or its driver is defective")


def report_memory(findings: Findings, trainer: Trainer, pl_module: LightningModule) -> None:
    """Report the memory of weights, gradients and optimizer state."""
    parameters = list(pl_module.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    state = [
        value
        for optimizer in trainer.optimizers
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    tensors: dict[str, list[Any]] = {"weights": parameters, "gradients": gradients, "optimizer state": state}
    parts = [f"{name} {format_bytes(_num_bytes(some))}" for name, some in tensors.items()]
    findings.ok("memory", ", ".join(parts) + (" in each process" if trainer.world_size > 1 else ""))


def report_peak_memory(findings: Findings, device: torch.device) -> None:
    """Report the largest memory that a process has used: of its GPU, or resident."""
    if device.type == "cuda":
        most = max(gather(torch.cuda.max_memory_allocated(device)))
        whole = torch.cuda.get_device_properties(device).total_memory
        findings.ok("peak memory", f"{format_bytes(most)} of the GPU's {format_bytes(whole)}")
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes
        most = max(gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))
        findings.ok("peak memory", f"{format_bytes(most)} resident in a process")


def check_checkpoint(findings: Findings, written: dict[str, Any], path: Path, seconds: float) -> None:
    """Read a checkpoint back, compare it with its content in memory, and load its task.

    Args:
        findings: to report to.
        written: the content as it was given to be written.
        path: the file, or a folder of shards.
        seconds: the time that writing took.
    """
    wrong = find_differences(written, read(path, whole=False))  # of sharded tensors, this process's part
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        findings.fail(
            "checkpoint",
            f"{', '.join(wrong[:3])}{more} differ when read back: the disk or a callback's state is defective",
        )
        return
    try:
        run.load(path)
    except Exception as error:  # any exception of the task's code: the run's result would be unusable
        findings.fail(
            "checkpoint",
            f"`bigmodel.load` cannot restore the task from it without data: {type(error).__name__}: {error}",
        )
        return
    findings.ok(
        "checkpoint",
        f"{format_bytes(size_on_disk(path))}, written in {seconds:.2f} s, read back bitwise equal, loaded without data",
    )


def _num_bytes(tensors: list[Any]) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
