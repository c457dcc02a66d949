"""Teacher outputs for each step, computed online or read from the cache.

V views of each sample (epochs of augmentation that repeat), n positions, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from bigmodel import run
from bigmodel.data.cache import say
from bigmodel.data.output_cache import OutputCache
from bigmodel.data.sampling import sequential_loader
from bigmodel.nn.loss import IGNORE_INDEX
from bigmodel.tasks.distillation import cache as kept_logits
from bigmodel.tasks.distillation import losses
from bigmodel.tasks.distillation.cache import TeacherCache
from bigmodel.tasks.distillation.loss_terms import FeatureTerm, PredictionTerm, Term
from bigmodel.tasks.distillation.mean_teacher import MeanTeacher
from bigmodel.tasks.distillation.teachers import Layers, Published, Teacher, Teachers, find_teacher, problem_type_of
from bigmodel.training.precision import decide

_SAMPLES_SHOWN = 64  # of the data, to detect a changed augmentation


class TeacherOutputs:
    """Finds teachers, and runs them or reads their cached outputs. Not a module of the student, and not in its
    checkpoints.

    Args:
        teacher: see `Distillation`.
        terms: of the loss.
        cache: cache of the outputs; None: no cache.

    Attributes:
        paths: of the teachers that are runs or published models.
        mean_teacher: the teacher that is an average of the student.
        teachers: the loaded teachers; None before `find`, and if all outputs are cached.
        keys: cache key of each teacher; empty without a cache.
    """

    def __init__(self, teacher: str | list[str] | MeanTeacher, terms: list[Term], cache: TeacherCache | None) -> None:
        self.mean_teacher = teacher if isinstance(teacher, MeanTeacher) else None
        paths = [] if isinstance(teacher, MeanTeacher) else [teacher] if isinstance(teacher, str) else list(teacher)
        if not paths and self.mean_teacher is None:
            raise ValueError("--model.teacher is empty: name a run, or a model in Hugging Face's format")
        self.paths, self.cache = paths, cache
        self.of_labels = False  # True if the K labels are independent; set when the student knows its data
        self.feature_terms = [term for term in terms if isinstance(term, FeatureTerm)]
        self.needs_classes = [term for term in terms if isinstance(term, PredictionTerm) and term.needs_classes]
        predicting = [term for term in terms if isinstance(term, PredictionTerm)]
        self.temperatures = sorted({term.temperature for term in predicting})
        if self.feature_terms and len(paths) > 1:
            raise ValueError(
                "--model.losses: terms of layers compare with one teacher, and --model.teacher names several"
            )
        if cache is not None:
            self._check_cache(cache, predicting)
        self.found: list[Teacher | Published] = []
        self.teachers: Teachers | None = None
        self._layers: Layers | None = None
        self._stores: list[OutputCache | None] = []
        self._views = 1
        self._why_anew: list[str] = []
        self.keys: list[dict[str, Any]] = []
        self._looked_up: list[dict[str, Tensor]] = []

    def _check_cache(self, cache: TeacherCache, predicting: list[PredictionTerm]) -> None:
        if self.mean_teacher is not None:
            raise ValueError(
                "--model.cache keeps what a teacher says, and a MeanTeacher changes in each step: leave out the cache"
            )
        if self.feature_terms:
            raise ValueError(
                f"--model.cache keeps logits, and {type(self.feature_terms[0]).__name__} needs the teacher's layers: leave"
                " out one of the two"
            )
        if cache.top_k is None:
            return
        if len(self.paths) > 1:
            raise ValueError(
                "--model.cache.top_k: several teachers have other likeliest classes each: keep all, or one teacher"
            )
        if self.needs_classes:
            raise ValueError("--model.cache.top_k: DKD needs the probabilities of all classes: leave out top_k")
        if len(self.temperatures) != 1 or any(term.temperature_schedule is not None for term in predicting):
            raise ValueError(
                "--model.cache.top_k: the rest's probability is known at one temperature alone: give all losses the same,"
                " and no temperature_schedule"
            )

    @property
    def identities(self) -> list[str]:
        """Digests of the teachers' weights."""
        return [teacher.identity for teacher in self.found]

    def find(self, student: Any) -> None:
        """Find the teachers that are runs or published models; load them unless all outputs are cached.

        Called before the net is built.

        Raises:
            ValueError: if one does not match the student or its data, or the targets are of a type that cannot be
                distilled.
        """
        self._check_problem_type(student)
        if not self.paths:
            return
        self.found = [find_teacher(path, student) for path in self.paths]
        self.paths = [teacher.path for teacher in self.found]
        run.record_resolved_argument(student.trainer, "teacher", self.paths if len(self.paths) > 1 else self.paths[0])
        if self.cache is not None:
            self._find_stores(student.trainer)
            if all(store is not None for store in self._stores):
                return
        self.take([teacher.load(student) for teacher in self.found])

    def in_words(self) -> list[str]:
        """Describe each teacher in a line; called when the stores exist."""
        if self.mean_teacher is not None:
            return [f"an average of the student, decay {self.mean_teacher.decay}"]
        if self.teachers is None:
            return [
                f"{path}, read from {store.path}"
                for path, store in zip(self.paths, self._stores, strict=True)
                if store is not None
            ]
        lines = []
        for number, (teacher, task) in enumerate(zip(self.found, self.teachers.tasks, strict=True)):
            count = sum(parameter.numel() for parameter in task.net.parameters())
            store = self._stores[number] if self.cache is not None else None
            kept = f", kept in {store.path} ({store.num_bytes / 1e6:,.1f} MB)" if store is not None else ""
            lines.append(f"{type(task.net).__name__}, {run.format_parameter_count(count)}, of {teacher.path}{kept}")
        return lines

    def _check_problem_type(self, student: Any) -> None:
        problem_type = problem_type_of(student)
        if problem_type not in ("single_label_classification", "multi_label_classification"):
            raise ValueError(
                f"--model.student: its data are of {problem_type}, and what is compared are probabilities, of"
                " classes or of labels: train it alone, or make classes of what it is to tell"
            )
        if self.needs_classes and getattr(student.trainer.datamodule, "mix", None) is not None:
            raise ValueError("--model.losses: DKD needs the class of each sample: leave out --data.mix")
        self.of_labels = problem_type == "multi_label_classification"
        if not self.of_labels:
            return
        if self.needs_classes:
            raise ValueError(
                f"--model.losses: {type(self.needs_classes[0]).__name__} compares the one class of a sample with the"
                " others, and these samples may have several labels: take KD or GeneralizedJSD"
            )
        if self.cache is not None and self.cache.top_k is not None:
            raise ValueError(
                "--model.cache.top_k keeps the likeliest of classes that exclude each other, and these samples may have"
                " several labels: leave it out"
            )

    def take(self, tasks: list[Any]) -> None:
        """Use these tasks as teachers."""
        self.teachers = Teachers(tasks, self.of_labels)
        if self.feature_terms:
            names = {term.teacher for term in self.feature_terms if term.teacher is not None}
            self._layers = Layers(self.teachers.tasks[0].net, names, "teacher")

    def _find_stores(self, trainer: Trainer) -> None:
        assert self.cache is not None
        decide(trainer)  # the cache depends on it
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "mix", None) is not None:
            raise ValueError(
                "--model.cache: pictures that are mixed with their neighbours are new in each batch: leave out --data.mix"
            )
        loader = data.train_dataloader()
        self._views = getattr(loader.order, "views", None) or 1
        self._num_samples = loader.num_samples
        first, last = (self._first(trainer, loader, view) for view in (0, self._views - 1))
        for teacher in self.found:
            key = self.cache.key(
                teacher.identity,
                data.fingerprint,
                kept_logits.shown([first, last], getattr(data, "augmentation", "")),
                str(trainer.precision),
                self.temperatures[0] if self.temperatures else None,
            )
            store = kept_logits.find_store(self.cache, key, self._num_samples, self._views)
            everywhere = trainer.strategy.reduce_boolean_decision(store is not None)
            self._stores.append(store if everywhere else None)
            self.keys.append(key)
        own = {store.path for store in self._stores if store is not None}
        for key, store in zip(self.keys, self._stores, strict=True):
            if store is None:
                alike = kept_logits.check_others(self.cache, key, self._num_samples, self._views, own)
                self._why_anew += [alike] if alike is not None else []

    def check_cache(self, keys: list[dict[str, Any]]) -> None:
        """Check that a resumed run reads the same cache as before.

        Args:
            keys: of its stores until now.

        Raises:
            ValueError: if they differ.
        """
        if bool(keys) != bool(self.keys):
            raise ValueError(
                f"--model.cache: this run was distilled {'from' if keys else 'without'} a cache: resume it as it was"
            )
        for there, wanted in zip(keys, self.keys, strict=True):
            differing = {name: (wanted[name], there[name]) for name in wanted if wanted[name] != there[name]}
            if differing:
                raise ValueError(
                    "--model.cache: until now this run has read what a teacher said under other conditions:"
                    f" {kept_logits.in_words(differing)}. Resume it as it was"
                )

    @staticmethod
    def _first(trainer: Trainer, loader: Any, epoch: int, device: torch.device | None = None) -> Any:
        """Return the first samples of an epoch."""
        batch = next(iter(sequential_loader(loader, rows=_SAMPLES_SHOWN, epoch=epoch)))
        return trainer.strategy.batch_to_device(batch, device)

    def allot(self, student: LightningModule) -> None:
        """Check the disk space for the cache. Called before there is a run directory.

        Raises:
            ValueError: if the disk is too small, or samples are new in each epoch.
        """
        if self.cache is None or self.teachers is None:
            return
        trainer: Any = student.trainer
        loader, others = trainer.datamodule.train_dataloader(), 0
        for number, task in enumerate(self.teachers.tasks):
            shape = self._check_views(trainer, loader, task)
            store = kept_logits.new_store(self.cache, self.keys[number], self._num_samples, self._views, shape)
            store.check_space(beside=others)
            others += store.num_missing_bytes
            self._stores[number] = store
        if trainer.is_global_zero:
            for alike in self._why_anew:
                say(f"the teacher's logits are computed anew; most like them is {alike}")

    def begin(self, student: LightningModule) -> None:
        """Move the teachers to the student's device, and compute what is missing in the cache.

        Raises:
            ValueError: if the disk has become too small, or teachers do not predict where the student does.
        """
        if self.teachers is not None:
            for task in self.teachers.tasks:
                task.to(student.device)
            if self.mean_teacher is None:
                self._check_asked(student, self.teachers.tasks)
            if self.cache is not None:
                self._keep(student.trainer, self.cache, self.teachers)
                self.teachers = None
        if self.teachers is None:
            self._look_up_ahead(student)

    def end(self, student: LightningModule) -> None:
        """Restore the hooks of the student and the data module."""
        for owner in (student, getattr(student.trainer, "datamodule", None)):
            if owner is not None:
                owner.__dict__.pop("on_before_batch_transfer", None)

    def _keep(self, trainer: Trainer, cache: TeacherCache, teachers: Teachers) -> None:
        loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        temperature = self.temperatures[0] if self.temperatures else 1.0
        for store, task in zip(self._stores, teachers.tasks, strict=True):

            def say(batch: Any, task: Any = task) -> dict[str, Tensor]:
                logits = self._logits(trainer, task, trainer.strategy.batch_to_device(batch))
                return cache.pack(logits, temperature)

            assert store is not None
            store.compute(
                trainer,
                lambda view: sequential_loader(loader, rows=loader.order.micro, trainer=trainer, epoch=view),
                say,
            )

    def _check_asked(self, student: Any, tasks: list[Any]) -> None:
        """Check that teachers predict at the student's positions, and can read its batches (no cached features of its
        net).
        """
        trainer = student.trainer
        batch = next(iter(sequential_loader(trainer.datamodule.train_dataloader(), rows=_SAMPLES_SHOWN)))
        handed = student._on_before_batch_transfer(batch)
        if self.cache is None and type(handed) is not type(batch):
            raise ValueError(
                f"--model.teacher: the student reads a {type(handed).__name__} computed with its own net, of which a"
                " teacher can say nothing: set --model.cache bigmodel.tasks.distillation.TeacherCache, or"
                " --model.student.method.cache false"
            )
        batch = trainer.strategy.batch_to_device(batch)
        counted = student.targets(batch) != IGNORE_INDEX
        for path, task in zip(self.paths, tasks, strict=True):
            silent = counted & (task.targets(batch) == IGNORE_INDEX)
            if silent.any():
                raise ValueError(
                    f"--model.teacher {path} does not predict at {int(silent.sum()):,} of the first {int(counted.sum()):,}"
                    " positions at which the student does, as where one reads sequences with masks: take one that is"
                    " trained as the student is"
                )

    @staticmethod
    def _logits(trainer: Trainer, task: Any, batch: Any) -> Tensor:
        with trainer.precision_plugin.forward_context():
            logits: Tensor = task.logits(task.features(batch))
        return logits

    @torch.no_grad()
    def _check_views(self, trainer: Trainer, loader: Any, task: Any) -> torch.Size:
        """Check that epochs repeat as often as the cache assumes; return the shape of a sample's logits. Runs on the
        CPU.
        """
        cpu = torch.device("cpu")
        first = self._first(trainer, loader, 0, cpu)
        if getattr(loader.order, "views", None) is None:
            again = self._first(trainer, loader, 1, cpu)
            # Equal batches have equal outputs. Others may differ in fields that the teacher does not read, such as
            # negatives.
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            if getattr(data, "augmentation", "") or (
                not _equal(first, again)
                and not torch.equal(self._logits(trainer, task, first), self._logits(trainer, task, again))
            ):
                raise ValueError(
                    "--model.cache: the samples look otherwise in each epoch, and what is kept of them is met once: set"
                    " --data.views to the number of epochs after which they come again, or leave out the cache"
                )
        one = type(first)(*(values[:1] if isinstance(values, Tensor) else values for values in first))
        return self._logits(trainer, task, one).shape[1:]

    def _look_up_ahead(self, student: LightningModule) -> None:
        """Read the cached outputs of a batch before it goes to the device; indices on the device would need a
        synchronisation.
        """
        trainer: Any = student.trainer
        # Lightning calls one of the two hooks, that of the data module if it has one.
        hook, data = "on_before_batch_transfer", trainer.datamodule
        owner: Any = student if is_overridden(hook, student) and not is_overridden(hook, data) else data
        hand_on = owner.on_before_batch_transfer

        def look_up(batch: Any, dataloader_idx: int) -> Any:
            if trainer.training:
                loader: Any = trainer.train_dataloader
                view = loader.course.at(trainer.global_step).epoch % self._views
                self._looked_up = [store.read(batch.index, view) for store in self._stores if store is not None]
            return hand_on(batch, dataloader_idx)

        owner.on_before_batch_transfer = look_up

    def hear(self, batch: Any) -> tuple[list[Tensor], dict[str | None, Tensor]]:
        """Return the teacher outputs of a batch.

        Returns:
            For its positions, tensors [n, ...] for `log_probabilities`; and the teacher's layers that terms compare, by
            name, and the features that its output layer reads under None.
        """
        if self.teachers is not None:
            features = self.teachers.features(batch)
            layers = self._layers.take(features[0]) if self._layers is not None else {}
            return [rows.flatten(0, -2) for rows in features], layers
        device = batch.index.device
        rows = []
        for kept in self._looked_up:
            rows += kept_logits.unpack({name: values.to(device, non_blocking=True) for name, values in kept.items()})
        return rows, {}

    def log_probabilities(self, student: Tensor, rows: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of student and teacher [n, K]; for labels [n, K, 2].

        Args:
            student: logits [n, K].
            rows: a part of the result of `hear`.
            temperature: T.
        """
        if self.of_labels:
            student = losses.each_alone(student)
        if self.teachers is not None:
            return losses.log_probabilities(student, temperature), self.teachers.log_probabilities(rows, temperature)
        if self.cache is not None and self.cache.top_k is not None:
            return kept_logits.log_probabilities(student, rows, temperature)
        if self.of_labels:
            rows = [losses.each_alone(logits) for logits in rows]
        said = [losses.log_probabilities(logits, temperature) for logits in rows]
        return losses.log_probabilities(student, temperature), losses.mean_of_probabilities(said)


def _equal(a: Any, b: Any) -> bool:
    """True if all tensors of two batches are equal."""
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
