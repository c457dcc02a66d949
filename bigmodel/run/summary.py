"""Lines printed when a run starts: net, device, profile."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler

from bigmodel.data.sampling import Loader
from bigmodel.data.text import print_text


def format_parameter_count(count: int) -> str:
    """Format a number of parameters, exact below a million."""
    return f"{count:,} parameters" if count < 1_000_000 else f"{count / 1e6:,.2f} M parameters"


def describe_missing(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """Return a line for each feature that this module and its loader do not get, with the reason. Called in training."""
    lines = []
    loader: Any = trainer.train_dataloader
    if not isinstance(loader, Loader):
        kind = type(loader).__name__
        lines.append(
            f"data       a {kind} defines its own order: a resumed run sees other samples than an uninterrupted one; it"
            " continues exactly with bigmodel.data.sampling.train_loader"
        )
        lines.append(
            f"batch      a {kind} defines its own batch size, on each process: more processes make larger steps; it is"
            " global with bigmodel.data.sampling.train_loader"
        )
    if not pl_module.automatic_optimization:
        lines.append(
            "steps      training batches, because the module optimizes manually: no accumulation, no train/loss, no"
            " detection of anomalies; each optimizer's gradients are clipped by --trainer.gradient_clip_val"
        )
    limits = trainer.num_val_batches
    if not (limits if isinstance(limits, int | float) else sum(limits)):
        lines.append("best       no best checkpoint, because there is no validation: bigmodel.load takes the latest")
    return lines


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
