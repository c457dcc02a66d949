"""Trained tasks as teachers: found, checked against the student, and asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from bigmodel import checkpoint, run
from bigmodel.protocols import Predicts
from bigmodel.tasks.distillation import losses

_MAY_BE_LARGER = ("context_length", "max_length")  # in a teacher: it reads shorter samples too


class Teacher:
    """A trained task, found but not loaded.

    Args:
        path: a run directory, `last`, the end of a run's name, or a checkpoint.

    Raises:
        ValueError: if there is no such run, or its checkpoint says nothing of the task.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        is_file = Path(path).suffix == ".ckpt"
        # Verified when it is loaded, which may not be needed.
        self.checkpoint = Path(path) if is_file else checkpoint.find_checkpoint(run.find(path), verify=False)
        if not self.checkpoint.exists():
            raise ValueError(f"--model.teacher {path}: no checkpoint is there")
        content = checkpoint.read(self.checkpoint, verify=False, whole=False).get("bigmodel", {})
        if "model" not in content:
            raise ValueError(f"--model.teacher {path} says nothing of its task: it was not written by `bigmodel fit`")
        self.sizes: dict[str, int] = content["sizes"]
        self.identity = checkpoint.identity(self.checkpoint)

    def check_sizes(self, sizes: dict[str, int]) -> None:
        """See that it predicts of the same data what the student does.

        Raises:
            ValueError: if a number that the data know is another in the teacher's.
        """
        unknown = sizes.keys() ^ self.sizes.keys()
        if unknown:
            raise ValueError(
                f"--model.teacher {self.path} is of another kind than the student: its data know"
                f" {_listed(self.sizes)}, and these {_listed(sizes)}"
            )
        wrong = [
            f"{name} {self.sizes[name]:,}, and the student's {number:,}"
            for name, number in sizes.items()
            if self.sizes[name] != number and not (name in _MAY_BE_LARGER and self.sizes[name] > number)
        ]
        if wrong:
            raise ValueError(
                f"--model.teacher {self.path} has {'; '.join(wrong)}: a teacher must be trained on what the student is to"
                " predict"
            )

    def load(self, student: LightningModule) -> Any:
        """The task, in evaluation mode and without gradients.

        Raises:
            ValueError: if its checkpoint is damaged, it does not predict, or its outcomes are called otherwise than the
                student's.
        """
        task = run.load(self.checkpoint)
        if not isinstance(task, Predicts):
            raise ValueError(
                f"--model.teacher {self.path}: {type(task).__name__} cannot teach: it has no features, logits and targets"
            )
        own, others = getattr(student, "outcomes", None), getattr(task, "outcomes", None)
        if own is not None and others is not None and own != others:
            raise ValueError(
                f"--model.teacher {self.path} predicts other things than the student, or calls them otherwise:"
                f" {_first_difference(others, own)} (teacher, student)"
            )
        return task.requires_grad_(False)


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sizes.items()) or "no sizes"


def _first_difference(others: Any, own: Any) -> str:
    if isinstance(own, list) and isinstance(others, list):
        for number, (a, b) in enumerate(zip(others, own, strict=False)):
            if a != b:
                return f"number {number} is {a!r}, {b!r}"
        return f"{len(others):,}, {len(own):,} of them"
    return "their tokenizers differ" if isinstance(own, str) else "they differ"


class Teachers:
    """Loaded teachers, of which the mean of the probabilities counts.

    Args:
        tasks: that predict.
    """

    def __init__(self, tasks: list[Any]) -> None:
        self.tasks = tasks

    @torch.no_grad()
    def features(self, batch: Any) -> list[Tensor]:
        """Each teacher's features [B, ..., D]."""
        return [task.features(batch) for task in self.tasks]

    @torch.no_grad()
    def log_probabilities(self, features: list[Tensor], temperature: float) -> Tensor:
        """[n, K], from each teacher's features [n, D]."""
        said = [task.logits(rows) for task, rows in zip(self.tasks, features, strict=True)]
        return losses.mean_of_probabilities([losses.log_probabilities(logits, temperature) for logits in said])


class Layers:
    """What named layers of a net gave when it was last called.

    Args:
        net: in which they are.
        names: as `net.named_modules()` has them.
        flag: which setting of a term names them.

    Raises:
        ValueError: if there is no such layer; says which there are.
    """

    def __init__(self, net: nn.Module, names: set[str], flag: str) -> None:
        self.outputs: dict[str | None, Tensor] = {}
        modules = dict(net.named_modules())
        for name in sorted(names):
            if name not in modules:
                top = [known for known in modules if known and known.count(".") <= 1]
                raise ValueError(
                    f"--model.losses: there is no {flag} layer {name!r}; {type(net).__name__} has"
                    f" {', '.join(top[:40])}{', ...' if len(top) > 40 else ''}"
                )
            modules[name].register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def take(self, features: Tensor) -> dict[str | None, Tensor]:
        """The outputs, which are forgotten here, and the features beside them, under None."""
        outputs, self.outputs = self.outputs, {}
        return {None: features, **outputs}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode and without gradients, afterwards as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
