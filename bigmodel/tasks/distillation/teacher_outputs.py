"""Teacher outputs for each step, computed online or read from the cache.

n positions, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from bigmodel import run
from bigmodel.data.sampling import sequential_loader
from bigmodel.nn.loss import IGNORE_INDEX
from bigmodel.tasks.distillation import cache as logit_cache
from bigmodel.tasks.distillation import losses
from bigmodel.tasks.distillation.cache import TeacherCache
from bigmodel.tasks.distillation.cached_outputs import CachedOutputs
from bigmodel.tasks.distillation.loss_terms import FeatureTerm, PredictionTerm, RegressionTerm, Term
from bigmodel.tasks.distillation.mean_teacher import MeanTeacher
from bigmodel.tasks.distillation.teachers import (
    LayerRecorder,
    Published,
    Teacher,
    Teachers,
    find_teacher,
    problem_type_of,
)

_NUM_CHECKED = 64  # samples, for positions at which teacher and student predict, and for the type of targets
_ROUNDING = 1e-2  # of the sum of a distribution in half precision
_PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


class TeacherOutputs:
    """Loads teachers, and runs them or reads their cached outputs. It is no module: teachers are not in checkpoints.

    Args:
        teacher: see `Distillation`.
        terms: of the loss.
        cache: cache of the outputs; None: no cache.

    Attributes:
        paths: of the teachers that are runs or published models.
        mean_teacher: the teacher that is an average of the student.
        teachers: the loaded teachers; None before `load`, and if all outputs are cached.
    """

    def __init__(self, teacher: str | list[str] | MeanTeacher, terms: list[Term], cache: TeacherCache | None) -> None:
        self.mean_teacher = teacher if isinstance(teacher, MeanTeacher) else None
        paths = [] if isinstance(teacher, MeanTeacher) else [teacher] if isinstance(teacher, str) else list(teacher)
        if not paths and self.mean_teacher is None:
            raise ValueError("--model.teacher is empty: set a run, or a model in Hugging Face's format")
        self.paths, self.cache = paths, cache
        self.of_labels = False  # True if the K labels are independent; set once the student has its data
        self.of_numbers = False  # True for regression; likewise
        self.feature_terms = [term for term in terms if isinstance(term, FeatureTerm)]
        self.needs_classes = [term for term in terms if isinstance(term, PredictionTerm) and term.needs_classes]
        predicting = [term for term in terms if isinstance(term, PredictionTerm)]
        self._terms = terms
        self.temperatures = sorted({term.temperature for term in predicting})
        if self.feature_terms and len(paths) > 1:
            raise ValueError(
                f"--model.teacher has {len(paths)} teachers, and terms of layers in --model.losses compare with one: set one"
                " teacher, or only terms of predictions"
            )
        if cache is not None:
            self._check_cache_supports(cache, predicting)
        self.sources: list[Teacher | Published] = []
        self.teachers: Teachers | None = None
        self._layers: LayerRecorder | None = None
        temperature = self.temperatures[0] if self.temperatures else None
        self._cached = CachedOutputs(cache, temperature) if cache is not None else None

    def set_terms(self, terms: list[Term]) -> None:
        """Replace the terms of the loss."""
        self._terms = terms

    def _check_cache_supports(self, cache: TeacherCache, predicting: list[PredictionTerm]) -> None:
        if self.mean_teacher is not None:
            raise ValueError(
                "--model.cache holds outputs of a constant teacher, and a MeanTeacher changes in each step: set"
                " --model.cache null"
            )
        if self.feature_terms:
            raise ValueError(
                f"--model.cache holds logits, and {type(self.feature_terms[0]).__name__} in --model.losses needs the"
                " teacher's layers: set one of the two to null"
            )
        if cache.top_k is None:
            return
        if len(self.paths) > 1:
            raise ValueError(
                f"--model.cache.top_k {cache.top_k}: {len(self.paths)} teachers have different most likely classes: set"
                " --model.cache.top_k null, or one --model.teacher"
            )
        if self.needs_classes:
            raise ValueError(
                f"--model.cache.top_k {cache.top_k}: DKD needs the probabilities of all classes: set --model.cache.top_k"
                " null"
            )
        if len(self.temperatures) != 1 or any(term.temperature_schedule is not None for term in predicting):
            raise ValueError(
                f"--model.cache.top_k {cache.top_k} caches the probability of the other classes at one temperature: set the"
                " same for all --model.losses, without temperature_schedule"
            )

    @property
    def identities(self) -> list[str]:
        """Digests of the teachers' weights."""
        return [teacher.identity for teacher in self.sources]

    def load(self, student: Any) -> None:
        """Find the teachers that are runs or published models, and load them unless all outputs are cached.

        Called before the net is built.

        Raises:
            ValueError: if one does not match the student or its data, or the targets are of a type that cannot be
                distilled.
        """
        self._check_problem_type(student)
        if not self.paths:
            return
        self.sources = [find_teacher(path, student) for path in self.paths]
        self.paths = [teacher.path for teacher in self.sources]
        run.record_resolved_argument(student.trainer, "teacher", self.paths if len(self.paths) > 1 else self.paths[0])
        if self._cached is not None:
            self._cached.find(student.trainer, self.sources)
            if all(store is not None for store in self._cached.stores):
                return
        self.set_teachers([teacher.load(student) for teacher in self.sources])

    def describe(self) -> list[str]:
        """Describe each teacher in a line; called when the stores exist."""
        if self.mean_teacher is not None:
            return [f"an average of the student, decay {self.mean_teacher.decay}"]
        stores = self._cached.stores if self._cached is not None else [None] * len(self.paths)
        if self.teachers is None:
            return [
                f"{path}, read from {store.path}"
                for path, store in zip(self.paths, stores, strict=True)
                if store is not None
            ]
        lines = []
        for teacher, task, store in zip(self.sources, self.teachers.tasks, stores, strict=True):
            count = run.format_parameter_count(sum(parameter.numel() for parameter in task.net.parameters()))
            cached = f", cached in {store.path} ({store.num_bytes / 1e6:,.1f} MB)" if store is not None else ""
            lines.append(f"{type(task.net).__name__}, {count}, of {teacher.path}{cached}")
        return lines

    def _check_problem_type(self, student: Any) -> None:
        problem_type = problem_type_of(student)
        if problem_type not in _PROBLEM_TYPES:
            raise ValueError(
                f"--model.student: its targets are of type {problem_type!r} (problem_type); accepted are"
                f" {', '.join(_PROBLEM_TYPES)}"
            )
        self.of_numbers = problem_type == "regression"
        wrong = PredictionTerm if self.of_numbers else RegressionTerm
        if unfit := [type(term).__name__ for term in self._terms if isinstance(term, wrong)]:
            compared, names = ("probabilities", "SquaredError, HuberError") if self.of_numbers else ("numbers", "KD")
            raise ValueError(
                f"--model.losses: {unfit[0]} compares {compared}, and the student's targets are of type"
                f" {problem_type!r}: set {names} or terms of features instead, and this one to null"
            )
        if (
            self.of_numbers
            and self.cache is not None
            and (self.cache.top_k is not None or self.cache.dtype != "float32")
        ):
            raise ValueError(
                f"--model.cache.dtype {self.cache.dtype}, --model.cache.top_k {self.cache.top_k}: the predictions of a"
                " regression are cached as they are: set --model.cache.dtype float32 and --model.cache.top_k null"
            )
        if self.needs_classes and getattr(student.trainer.datamodule, "mix", None) is not None:
            raise ValueError("--model.losses: DKD needs the class of each sample: set --data.mix null")
        self.of_labels = problem_type == "multi_label_classification"
        if not self.of_labels:
            return
        if self.needs_classes:
            raise ValueError(
                f"--model.losses: {type(self.needs_classes[0]).__name__} needs one class per sample, and these samples may"
                " have several labels: set KD or GeneralizedJSD"
            )
        if self.cache is not None and self.cache.top_k is not None:
            raise ValueError(
                f"--model.cache.top_k {self.cache.top_k} needs classes that exclude each other, and these samples may have"
                " several labels: set --model.cache.top_k null"
            )

    def set_teachers(self, tasks: list[Any]) -> None:
        """Use these tasks as teachers."""
        self.teachers = Teachers(tasks, self.of_labels)
        if self.feature_terms:
            names = {term.teacher for term in self.feature_terms if term.teacher is not None}
            self._layers = LayerRecorder(self.teachers.tasks[0].net, names, "teacher")

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Cache keys of the teachers; empty without a cache."""
        return self._cached.keys if self._cached is not None else []

    def check_cache(self, saved: list[dict[str, Any]]) -> None:
        """Check that a resumed run reads the same cache as before.

        Args:
            saved: `keys` in the checkpoint.

        Raises:
            ValueError: if they differ.
        """
        if bool(saved) != bool(self.keys):
            raise ValueError(
                f"--model.cache: the run to be resumed was distilled {'with' if saved else 'without'} a cache: set the same"
            )
        if self._cached is not None:
            self._cached.check_keys(saved)

    def check_disk(self) -> None:
        """Check the disk space for the cache, see `CachedOutputs.check_disk`."""
        if self._cached is not None and self.teachers is not None:
            self._cached.check_disk(self.teachers.tasks)

    def setup(self, student: LightningModule) -> None:
        """Move the teachers to the student's device, and compute what is missing in the cache.

        Raises:
            ValueError: if the disk has become too small, or teachers do not predict where the student does.
        """
        self._check_targets(student)
        if self.teachers is not None:
            for task in self.teachers.tasks:
                task.to(student.device)
            if self.mean_teacher is None:
                self._check_positions(student, self.teachers.tasks)
            if self._cached is not None:
                self._cached.compute(self.teachers.tasks)
                self.teachers = None

    def _check_targets(self, student: Any) -> None:
        """Check that the first targets are of the type that the student declares.

        Raises:
            ValueError: if they are not.
        """
        if not any(isinstance(term, PredictionTerm | RegressionTerm) for term in self._terms):
            return
        trainer = student.trainer
        batch = next(iter(sequential_loader(trainer.datamodule.train_dataloader(), rows=_NUM_CHECKED)))
        targets: Tensor = student.targets(trainer.strategy.batch_to_device(batch))
        fit = True
        if self.of_numbers:
            fit = targets.is_floating_point()
        elif targets.is_floating_point() and not self.of_labels:  # distributions
            real = targets[batch.weight.to(targets.device) > 0]
            fit = targets.ndim > 1 and bool((real >= 0).all() and ((real.sum(-1) - 1).abs() < _ROUNDING).all())
        if not fit:
            raise ValueError(
                f"--model.student: {type(student).__name__} has targets {list(targets.shape)} of {targets.dtype}, which are"
                f" not those of its problem_type {problem_type_of(student)!r}: give the task the property problem_type with"
                f" one of {', '.join(_PROBLEM_TYPES)} (bigmodel.protocols.SupportsLogits)"
            )

    def _check_positions(self, student: Any, tasks: list[Any]) -> None:
        """Check that teachers predict at the student's positions, and can read its batches (no cached features of its
        net).
        """
        trainer = student.trainer
        batch = next(iter(sequential_loader(trainer.datamodule.train_dataloader(), rows=_NUM_CHECKED)))
        read = student.on_before_batch_transfer(batch, 0)
        if self.cache is None and type(read) is not type(batch):
            raise ValueError(
                f"--model.teacher: the student reads a {type(read).__name__} computed with its own net, which a teacher"
                " cannot read: set --model.cache bigmodel.tasks.distillation.TeacherCache, or"
                " --model.student.method.cache false"
            )
        batch = trainer.strategy.batch_to_device(batch)
        counted = student.targets(batch) != IGNORE_INDEX
        for path, task in zip(self.paths, tasks, strict=True):
            missing = counted & (task.targets(batch) == IGNORE_INDEX)
            if missing.any():
                raise ValueError(
                    f"--model.teacher {path} does not predict at {int(missing.sum()):,} of the first"
                    f" {int(counted.sum()):,} positions at which the student does (one of the two reads sequences with"
                    " masks, for example): set a teacher that was trained with the student's kind of net"
                )

    def read_ahead(self, batch: Any) -> None:
        """Read the cached outputs of a batch that is still on the CPU."""
        if self._cached is not None and self.teachers is None:
            self._cached.read_ahead(batch)

    def get(self, batch: Any) -> tuple[list[Tensor], dict[str | None, Tensor]]:
        """Return the teacher outputs of a batch.

        Returns:
            For its positions, tensors [n, ...] for `log_probabilities`; and the teacher's layers that terms compare, by
            name, and the features that its output layer reads under None.
        """
        if self.teachers is not None:
            features = self.teachers.features(batch)
            layers = self._layers.pop(features[0]) if self._layers is not None else {}
            return [rows.flatten(0, -2) for rows in features], layers
        assert self._cached is not None
        return self._cached.get(batch), {}

    def numbers(self, rows: list[Tensor]) -> Tensor:
        """Return the mean of the teachers' predictions [n, K] for regression.

        Args:
            rows: a part of the result of `get`.
        """
        logits = self.teachers.logits(rows) if self.teachers is not None else rows
        return torch.stack([each.float() for each in logits]).mean(0)

    def log_probabilities(self, student: Tensor, rows: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of student and teacher [n, K]; for labels [n, K, 2].

        Args:
            student: logits [n, K].
            rows: a part of the result of `get`.
            temperature: T.
        """
        if self.of_labels:
            student = losses.binary_logits(student)
        if self.teachers is not None:
            return losses.log_probabilities(student, temperature), self.teachers.log_probabilities(rows, temperature)
        if self.cache is not None and self.cache.top_k is not None:
            return logit_cache.log_probabilities(student, rows, temperature)
        if self.of_labels:
            rows = [losses.binary_logits(logits) for logits in rows]
        teachers = [losses.log_probabilities(logits, temperature) for logits in rows]
        return losses.log_probabilities(student, temperature), losses.mean_of_probabilities(teachers)
