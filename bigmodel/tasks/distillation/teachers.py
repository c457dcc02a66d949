"""Trained tasks as teachers: find, load and run them, and check them against the student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from bigmodel import checkpoint, run
from bigmodel.pretrained import published
from bigmodel.protocols import SupportsFromPretrained, SupportsLogits
from bigmodel.tasks.distillation import losses
from bigmodel.training.callbacks.training_log import outside_mfu

_FLAG = "--model.teacher"
_MAY_BE_LARGER = ("context_length", "max_length")  # in a teacher: it can read shorter samples


@contextmanager
def _add_flag(path: str, remedy: str = "") -> Iterator[None]:
    """Add the flag to errors of runs and checkpoints."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_FLAG} {path}: {error}{remedy}") from error


def find_teacher(path: str, student: LightningModule) -> Teacher | Published:
    """Find a teacher by its path; a local path is preferred to the hub.

    Raises:
        ValueError: if there is none, or it does not match the student's data as far as is known without loading it.
    """
    folder = Path(path).expanduser()
    if path.startswith(published.HUB) or (
        (folder / published.CONFIG).is_file() and not (folder / "config.yaml").is_file()
    ):
        return Published(path, student)
    if folder.is_dir() and path != "last" and not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{_FLAG} {path} is neither a run (it has no config.yaml) nor a model in Hugging Face's format (no"
            f" {published.CONFIG}); `bigmodel list` shows the runs"
        )
    try:
        teacher = Teacher(path, run.runs_dir(student.trainer))
    except ValueError as error:
        if path.count("/") == 1 and not folder.exists():
            raise ValueError(f"{error}; a model of the Hugging Face hub is {published.HUB}{path}") from error
        raise
    teacher.check_sizes(run.sizes(student))
    return teacher


class Teacher:
    """A trained task, found but not loaded.

    Args:
        path: a run directory, `last`, the end of a run's name, or a checkpoint.
        runs_dir: folder in which runs are looked up.

    Attributes:
        path: the run's directory, or the checkpoint: a path that stays valid.

    Raises:
        ValueError: if there is no such run, or its checkpoint does not describe the task.
    """

    def __init__(self, path: str, runs_dir: str = "runs") -> None:
        with _add_flag(path):
            is_file = Path(path).suffix == ".ckpt"
            self.path = path if is_file else str(run.find_run(path, runs_dir))
            # Verified by `load`, which is not called if all its outputs are cached.
            self.checkpoint = Path(path) if is_file else checkpoint.find_checkpoint(Path(self.path), verify=False)
            if not self.checkpoint.exists():
                raise ValueError("the checkpoint does not exist")
            content = checkpoint.read(self.checkpoint, verify=False, whole=False).get("bigmodel", {})
            if "model" not in content:
                raise ValueError(
                    "the checkpoint lacks the description of its task: it was not written by `bigmodel fit`"
                )
        self.sizes: dict[str, int] = content["sizes"]
        self.identity = checkpoint.content_hash(self.checkpoint)

    def check_sizes(self, sizes: dict[str, int]) -> None:
        """Check that it was built with the same sizes as the student.

        Raises:
            ValueError: if a size that the data determine differs.
        """
        unknown = sizes.keys() ^ self.sizes.keys()
        if unknown:
            raise ValueError(
                f"{_FLAG} {self.path} is of another task than the student: its data define {_listed(self.sizes)}, the"
                f" student's {_listed(sizes)}; set a run of the student's task"
            )
        wrong = [
            f"{name} {self.sizes[name]:,}, and the student's {number:,}"
            for name, number in sizes.items()
            if self.sizes[name] != number and not (name in _MAY_BE_LARGER and self.sizes[name] > number)
        ]
        if wrong:
            raise ValueError(
                f"{_FLAG} {self.path} has {'; '.join(wrong)}: set a teacher that was trained on the same kind of data, or"
                " the --data in its run's config.yaml"
            )

    def load(self, student: LightningModule) -> Any:
        """Load the task, in evaluation mode and without gradients.

        Raises:
            ValueError: if its checkpoint is damaged, it does not predict, or its label space has other names than the
                student's.
        """
        with _add_flag(self.path, "; set an undamaged checkpoint"):
            task = run.load(self.checkpoint)
        return _as_teacher(task, student, self.path)


class Published:
    """A model in Hugging Face's format, found but not loaded.

    Args:
        path: a folder, or hf://owner/name.
        student: the task whose type it is converted to.

    Raises:
        ValueError: if there is no such model, or the student's task cannot import one.
    """

    def __init__(self, path: str, student: LightningModule) -> None:
        self.path = path
        if not isinstance(student, SupportsFromPretrained):
            raise ValueError(
                f"{_FLAG} {path} is a model in Hugging Face's format, and {type(student).__name__} has no method"
                " from_pretrained (bigmodel.protocols.SupportsFromPretrained): set a run of `bigmodel fit`, which `bigmodel"
                " list` shows"
            )
        self.identity = published.identity(path, _FLAG)

    def load(self, student: Any) -> Any:
        """Load the model as a task of the student's type, see `Teacher.load`."""
        return _as_teacher(student.from_pretrained(self.path, _FLAG), student, self.path)


def _as_teacher(task: Any, student: LightningModule, path: str) -> Any:
    """Return the task without gradients.

    Raises:
        ValueError: if its predictions do not match the student's.
    """
    if not isinstance(task, SupportsLogits):
        raise ValueError(f"{_FLAG} {path}: {type(task).__name__} has no methods features, logits and targets")
    of_student, of_teacher = getattr(student, "label_space", None), getattr(task, "label_space", None)
    if of_student is not None and of_teacher is not None and of_student != of_teacher:
        raise ValueError(
            f"{_FLAG} {path} has classes or tokens that differ from the student's (teacher, student):"
            f" {_first_difference(of_teacher, of_student)}"
        )
    if problem_type_of(task) != problem_type_of(student):
        raise ValueError(
            f"{_FLAG} {path} has targets of type {problem_type_of(task)!r}, and the student of type"
            f" {problem_type_of(student)!r}: set a teacher of the same type"
        )
    return cast(Any, task).requires_grad_(False)


def problem_type_of(task: Any) -> str:
    """Type of the targets, see `bigmodel.protocols.SupportsLogits`: class, labels or number."""
    return str(getattr(task, "problem_type", "single_label_classification"))


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sizes.items()) or "no sizes"


def _first_difference(teacher: Any, student: Any) -> str:
    if isinstance(student, list) and isinstance(teacher, list):
        for number, (a, b) in enumerate(zip(teacher, student, strict=False)):
            if a != b:
                return f"number {number} is {a!r}, {b!r}"
        return f"{len(teacher):,}, {len(student):,} of them"
    return "set --data.tokenizer to the teacher's tokenizer" if isinstance(student, str) else "they differ"


class Teachers:
    """Loaded teachers, whose probabilities are averaged.

    Args:
        tasks: that predict.
        of_labels: True if the K labels are independent, see `losses.binary_logits`.
    """

    def __init__(self, tasks: list[Any], of_labels: bool = False) -> None:
        self.tasks, self.of_labels = tasks, of_labels

    @outside_mfu()
    @torch.no_grad()
    def features(self, batch: Any) -> list[Tensor]:
        """Return the features of each teacher [B, ..., D]."""
        return [task.features(batch) for task in self.tasks]

    @outside_mfu()
    @torch.no_grad()
    def logits(self, features: list[Tensor]) -> list[Tensor]:
        """Return the logits of each teacher [n, K] from its features [n, D]."""
        return [task.logits(rows) for task, rows in zip(self.tasks, features, strict=True)]

    @outside_mfu()
    @torch.no_grad()
    def log_probabilities(self, features: list[Tensor], temperature: float) -> Tensor:
        """Return log-probabilities [n, K], of labels [n, K, 2], from each teacher's features [n, D]."""
        logits = self.logits(features)
        if self.of_labels:
            logits = [losses.binary_logits(each) for each in logits]
        return losses.mean_of_probabilities([losses.log_probabilities(each, temperature) for each in logits])


class LayerRecorder:
    """Records the outputs of named layers of a net.

    Args:
        net: the net.
        names: names of the layers, as in `net.named_modules()`.
        model: `student` or `teacher`, for messages.

    Raises:
        ValueError: if there is no such layer; the message lists those that exist.
    """

    def __init__(self, net: nn.Module, names: set[str], model: str) -> None:
        self.outputs: dict[str | None, Tensor] = {}
        modules = dict(net.named_modules())
        for name in sorted(names):
            if name not in modules:
                top = [path for path in modules if path and path.count(".") <= 1]
                raise ValueError(
                    f"--model.losses: the {model}'s net {type(net).__name__} has no layer {name!r}; it has"
                    f" {', '.join(top[:40])}{', ...' if len(top) > 40 else ''}"
                )
            modules[name].register_forward_hook(self._record(name))

    def _record(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def pop(self, features: Tensor) -> dict[str | None, Tensor]:
        """Return and clear the recorded outputs, with the features under None."""
        outputs, self.outputs = self.outputs, {}
        return {None: features, **outputs}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode without gradients; restore it afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode
