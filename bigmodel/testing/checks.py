"""Checks of what every task must have; each function returns its result as text, or raises with the reason."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from bigmodel.cli import plugins
from bigmodel.cli.formatting import format_batch
from bigmodel.data.sampling import Loader
from bigmodel.protocols import Batch, TaskData
from bigmodel.run.config import Config
from bigmodel.testing.recorder import RunRecorder
from bigmodel.testing.samples import has_split


@dataclass(frozen=True)
class CheckResult:
    """Result of one check.

    Attributes:
        status: skip: the check was not possible, or the task does not implement what it checks.
        check: the name of the check.
        text: the result; for a failure, including a remedy.
    """

    status: Literal["ok", "FAIL", "skip"]
    check: str
    text: str


class CheckFailed(Exception):
    """A requirement is violated; the message includes a remedy."""


class CheckSkipped(Exception):
    """A check is not possible; the message gives the reason.

    Args:
        reason: the message.
        blocked: another check, on which this one depends, has failed.
    """

    def __init__(self, reason: str, *, blocked: bool = False) -> None:
        super().__init__(reason)
        self.blocked = blocked


def find_missing_arguments(config: Config) -> CheckResult | None:
    """Return a failure if task or data lack an argument that every run needs; None if they have all."""
    for check, key, needed in (
        ("task", "model", ("optimizer", "schedule")),
        ("data", "data", ("batch_size", "micro_batch_size")),
    ):
        class_path = config[key]["class_path"]
        accepted = inspect.signature(plugins.import_class(class_path)).parameters
        missing = [name for name in needed if name not in accepted]
        if missing:
            protocol = "Task" if check == "task" else "TaskData"
            return CheckResult(
                "FAIL",
                check,
                f"{class_path} does not accept {' and '.join(missing)}: add to its __init__, as described in"
                f" bigmodel.protocols.{protocol}. Correct this first: all other checks need a run",
            )
    return None


def check_task(run: RunRecorder) -> str:
    """Check that configure_model creates the net from its configuration, and only once."""
    task, name = run.task, type(run.task).__name__
    if run.had_parameters:
        raise CheckFailed(
            f"{name} has parameters before configure_model, so it cannot be sharded, and its sizes do not come from the"
            " data: create the net in configure_model, from bigmodel.sizes(self)"
        )
    net = getattr(task, "net", None)
    if not isinstance(net, nn.Module):
        raise CheckFailed(
            f"{name}.net is {net!r} after configure_model: assign the net to it, as export needs it there"
        )
    task.configure_model()
    if task.net is not net:
        raise CheckFailed(
            "configure_model created a second net when it was called again: begin it with `if self.net is None:`"
        )
    count = sum(p.numel() for p in net.parameters())
    return f"{name} creates {type(net).__name__} ({count:,} parameters) in configure_model, once"


def check_data(run: RunRecorder) -> str:
    """Check sizes and fingerprint."""
    data, name = run.data, type(run.data).__name__
    missing = [attribute for attribute in TaskData.__annotations__ if not hasattr(data, attribute)]
    if missing or not isinstance(data, TaskData):
        raise CheckFailed(
            f"{name} has no {', no '.join(missing)} after setup; bigmodel.protocols.TaskData describes its attributes"
        )
    wrong = {key: size for key, size in data.sizes.items() if type(key) is not str or type(size) is not int}
    if wrong:
        raise CheckFailed(f"{name}.sizes has {wrong}: keys must be str and values plain int, for the checkpoint")
    if not isinstance(data.fingerprint, str) or not data.fingerprint:
        raise CheckFailed(
            f"{name}.fingerprint is {data.fingerprint!r}: it must be a non-empty str, such as a hash of the samples"
        )
    sizes = ", ".join(f"{key} {size:,}" for key, size in data.sizes.items())
    return f"{name} defines {sizes}; fingerprint {data.fingerprint[:8]}"


def check_batch(run: RunRecorder) -> str:
    """Check for a NamedTuple of tensors, with index and weight."""
    batch: Any = run.batch
    if not (isinstance(batch, tuple) and hasattr(batch, "_fields")):
        raise CheckFailed(
            f"a batch is a {type(batch).__name__}: it must be a NamedTuple of tensors, with index and weight"
        )
    if not isinstance(batch, Batch) or not {"index", "weight"} <= set(batch._fields):
        raise CheckFailed(
            f"{format_batch(batch)} lacks index [B] (number of the sample) or weight [B] (0 for padding rows)"
        )
    other = [name for name, part in zip(batch._fields, batch, strict=True) if not isinstance(part, Tensor)]
    if other:
        raise CheckFailed(
            f"fields of the batch are not tensors: {', '.join(other)}. A batch is moved to the device whole"
        )
    index: Any = batch.index
    weight: Any = batch.weight
    rows = {name: part.shape[0] if part.ndim else None for name, part in zip(batch._fields, batch, strict=True)}
    if len(set(rows.values())) > 1 or index.ndim != 1 or weight.ndim != 1:
        raise CheckFailed(
            f"{format_batch(batch)}: all fields must have the same first dimension; index and weight must have no other"
        )
    if index.is_floating_point() or not weight.is_floating_point() or not (weight > 0).all():
        raise CheckFailed(f"{format_batch(batch)}: index must be integers, and weight floats above 0 in training")
    return format_batch(batch)


def check_loaders(run: RunRecorder) -> str:
    """Check that the loaders are from bigmodel.data.sampling."""
    names = [name for name in ("train_dataloader", "val_dataloader") if has_split(run.data, name)]
    for name in names:
        loader = getattr(run.data, name)()
        one = loader[0] if isinstance(loader, list | tuple) else loader
        if not isinstance(one, Loader):
            function = "train_loader" if name == "train_dataloader" else "eval_loader"
            raise CheckFailed(
                f"{name} returns a {type(one).__name__}, which gives all processes the same samples and cannot resume in"
                f" mid-epoch: create it with bigmodel.data.sampling.{function}"
            )
    steps = len(run.trainer.train_dataloader)  # without accumulation, each batch is a step
    missing = "" if "val_dataloader" in names else "; no validation split"
    return f"created by bigmodel.data.sampling; {steps:,} steps of {run.data.batch_size} samples per epoch{missing}"
