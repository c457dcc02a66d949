"""Lines printed when a run starts: net, device, profile."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from bigmodel.data.text import print_text


def format_parameter_count(count: int) -> str:
    """Format a number of parameters, exact below a million."""
    return f"{count:,} parameters" if count < 1_000_000 else f"{count / 1e6:,.2f} M parameters"


def print_summary(trainer: Trainer, pl_module: LightningModule) -> None:
    """Print the net's size, the device and the profiler's folder; then the task's own lines, if it has any."""
    net = getattr(pl_module, "net", None) or pl_module
    count = sum(p.numel() for p in net.parameters())
    print_text(f"net        {type(net).__name__}, {format_parameter_count(count)}")
    on_gpu = pl_module.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    print_text(
        f"device     {trainer.world_size} x {pl_module.device.type} ({device}), {trainer.precision},"
        f" {trainer.accumulate_grad_batches} micro-batch(es) a step",
        flush=True,
    )
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    if not isinstance(profiler, PassThroughProfiler):
        print_text(f"profile    {profiler.dirpath}: a table at the end", flush=True)
    log_trainable_parameters = getattr(pl_module, "log_trainable_parameters", None)  # optional method of a task
    if log_trainable_parameters is not None:
        log_trainable_parameters()
