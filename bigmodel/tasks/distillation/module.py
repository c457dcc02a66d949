"""Distillation: train a student on the predictions of a trained teacher, in addition to the data.

    loss = hard_weight * the student's own loss + sum over terms of weight * term

Any task that *SupportsLogits* can be teacher or student. The result is a run of the student: its checkpoints are those
of the plain task.

B samples, n positions (samples, or the tokens of all sequences), D width of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from bigmodel.data.sampling import sequential_loader
from bigmodel.data.schedule import num_steps
from bigmodel.internals import attached_trainer
from bigmodel.nn.loss import IGNORE_INDEX
from bigmodel.protocols import SupportsLogits, SupportsOnPolicySampling
from bigmodel.run import sizes
from bigmodel.tasks.distillation.cache import TeacherCache
from bigmodel.tasks.distillation.loss_terms import KD, FeatureTerm, PredictionTerm, Term
from bigmodel.tasks.distillation.losses import counted_sum, sum_in_chunks
from bigmodel.tasks.distillation.mean_teacher import MeanTeacher
from bigmodel.tasks.distillation.on_policy import OnPolicy
from bigmodel.tasks.distillation.teacher_outputs import TeacherOutputs
from bigmodel.tasks.distillation.teachers import Layers, evaluating

_TERMS = "distillation_terms"  # in the state of the student; checkpoints hold regressors separately


class Distillation(LightningModule):
    """Trains a student with a teacher, and evaluates it as the student's task does.

    Args:
        student: the task to be trained, with its net, optimizer and schedule.
        teacher: a trained task: a run directory, `last`, the end of a run's name, or a checkpoint; a model in Hugging
            Face's format, its folder or hf://owner/name; or several, whose probabilities are averaged. Or MeanTeacher:
            an average of the student.
        losses: terms by name: KD (by default, with weight 0.9), DKD, GeneralizedJSD, Hint, AttentionTransfer, Relational,
            SimilarityPreserving of bigmodel.tasks.distillation; null removes one.
        hard_weight: factor of the student's own loss, 0 or above.
        cache: on-disk cache of the teacher's logits: bigmodel.tasks.distillation.TeacherCache; null: run the teacher at
            each step.
        on_policy: let the student generate a share of the batches: bigmodel.tasks.distillation.OnPolicy; null: all are
            from the data.
        chunk_size: positions whose logits are in memory at once, for a large vocabulary; null: all of a micro-batch.
    """

    trained_submodule = "student"  # the argument whose checkpoints are saved
    lessons: TeacherOutputs
    net: Any

    def __init__(
        self,
        student: LightningModule,
        teacher: MeanTeacher | str | list[str],  # in this order, because a class path is also a str
        losses: dict[str, Term | None] | None = None,
        hard_weight: float = 0.1,
        cache: TeacherCache | None = None,
        on_policy: OnPolicy | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if not isinstance(student, SupportsLogits):
            raise ValueError(
                f"--model.student: {type(student).__name__} cannot be distilled: it has no features, logits and targets"
            )
        if not 0 <= hard_weight < float("inf"):
            raise ValueError(f"--model.hard_weight {hard_weight} must be a number of 0 or above")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"--model.chunk_size {chunk_size} must be at least 1 or null")
        named: dict[str, Term | None] = losses if losses is not None else {"kd": KD(weight=0.9)}
        terms = {name: term for name, term in named.items() if term is not None}
        if not hard_weight and not any(term.weight for term in terms.values()):
            raise ValueError(
                "--model.hard_weight and the weights of all --model.losses are 0: nothing would be learned"
            )
        if on_policy is not None:
            _check_on_policy(student, list(terms.values()), cache)
        # One shared state, two classes: this object is the student, except for what is defined below. Its parameters
        # have the same names as in the student, and its hooks and metrics are the student's.
        object.__setattr__(self, "__dict__", student.__dict__)
        self.__class__ = type(f"Distilled{type(student).__name__}", (Distillation, type(student)), {})
        setattr(self, _TERMS, nn.ModuleDict(terms))
        self.lessons = TeacherOutputs(teacher, list(terms.values()), cache)
        self.hard_weight, self.chunk_size, self.on_policy = hard_weight, chunk_size, on_policy
        self._student_type = type(student)
        self._heard: _StudentActivations | None = None  # recorded activations, while the student's own step runs
        self._student_layers: Layers | None = None
        self._num_steps = -1

    @property
    def terms(self) -> dict[str, Term]:
        """The loss terms, by name."""
        return dict(getattr(self, _TERMS).items())

    def configure_callbacks(self) -> list[Callback]:
        callbacks: Any = super().configure_callbacks()
        own = [self.lessons.mean_teacher] if self.lessons.mean_teacher is not None else []
        return [*([callbacks] if isinstance(callbacks, Callback) else callbacks), *own]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            if self.lessons.mean_teacher is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
                raise ValueError(
                    "--model.teacher: a MeanTeacher is the average of a net that is whole on each process, and"
                    " --trainer.strategy shards it: leave out one of the two"
                )
            if self.on_policy is not None:
                self.on_policy.check(sizes(self))
            with torch.random.fork_rng(devices=[]):  # same initial weights as without distillation
                self.lessons.find(self)
                self.lessons.allot(self)

    def configure_model(self) -> None:
        made = self.net is not None
        super().configure_model()
        trainer = attached_trainer(self)
        if made or trainer is None or not trainer.training:
            return
        mean_teacher = self.lessons.mean_teacher
        feature_terms = [term for term in self.terms.values() if isinstance(term, FeatureTerm)]
        if mean_teacher is not None:
            mean_teacher.begin(self, self._student_type, without=_TERMS)
            self.lessons.take([mean_teacher.task])
        if feature_terms:
            names = {term.student for term in feature_terms if term.student is not None}
            self._student_layers = Layers(self.net, names, "student")
            self._prepare(feature_terms)

    def _prepare(self, terms: list[FeatureTerm]) -> None:
        """Run a sample through both nets, and pass the shapes to the terms."""
        loader = sequential_loader(cast(Any, self.trainer).datamodule.train_dataloader(), rows=1)
        batch = self.trainer.strategy.batch_to_device(next(iter(loader)), torch.device("cpu"))
        assert self._student_layers is not None
        with evaluating(self):
            student = self._student_layers.take(self.features(batch))
            _, teacher = self.lessons.hear(batch)
        for term in terms:
            term.prepare(student[term.student].shape, teacher[term.teacher].shape)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._num_steps = num_steps(self.trainer)
        ending = [name for name, term in self.terms.items() if term.is_scheduled]
        if self._num_steps < 0 and ending:
            raise ValueError(
                f"--model.losses: what {ending[0]} schedules ends with the run, and the run has no end: set"
                " --trainer.max_steps or --trainer.max_epochs"
            )
        given = {
            id(p) for optimizer in self.trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        if any(id(parameter) not in given for parameter in getattr(self, _TERMS).parameters()):
            raise ValueError(
                f"--model.losses: what terms learn, such as the regressor of Hint, {self._student_type.__name__} leaves out"
                " when it makes its optimizer: its parameter groups hold those of its net alone"
            )
        self.lessons.begin(self)

    def log_trainable_parameters(self) -> None:
        """Print the student's own summary, and its teachers."""
        if (own := getattr(super(), "log_trainable_parameters", None)) is not None:
            own()
        for teacher in self.lessons.in_words():
            print(f"teacher    {teacher}", flush=True)

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.lessons.end(self)

    # The activations of the student's own step are recorded, so that they are computed once.

    def features(self, batch: Any) -> Tensor:
        """Return the student's features."""
        features: Tensor = cast(Any, super()).features(batch)
        if self._heard is not None:
            self._heard.features = features
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Return the student's logits."""
        logits: Tensor = cast(Any, super()).logits(features)
        if self._heard is not None:
            self._heard.logits.append(logits)
        return logits

    def training_step(self, batch: Any) -> dict[str, Any]:
        """Return the weighted sum of the student's own loss and the terms, and the count of the own loss.

        The unweighted losses are returned as `parts`. A batch that the student has generated has no ground truth: the
        student's own loss is left out there.
        """
        heard, own = _StudentActivations(), cast(Any, None)
        step = self.trainer.global_step
        rewritten = self.on_policy is not None and self.on_policy.chosen(step)
        if rewritten:
            batch = cast(OnPolicy, self.on_policy).rewrite(self, batch, step)
        if self.hard_weight and not rewritten:
            with self._listening(heard):
                own = super().training_step(batch)
        features = heard.features if heard.features is not None else self.features(batch)
        layers = self._student_layers.take(features) if self._student_layers is not None else {}
        counted, classes = self._targets(batch, features.shape[:-1])
        rows, teacher_layers = self.lessons.hear(batch)
        parts = self._compare_predictions(features, heard.logits, rows, counted, classes)
        shares = _shares(batch, counted) if layers else counted
        for name, term in self.terms.items():
            if isinstance(term, FeatureTerm):
                parts[name] = term(layers[term.student], teacher_layers[term.teacher], shares)
        loss = sum(term.weight_at(step, self._num_steps) * parts[name] for name, term in self.terms.items())
        told = {f"{name}_loss": value.detach() for name, value in parts.items()}
        if own is None:
            return {"loss": loss, "count": counted.sum(), "parts": told}
        if self.on_policy is None:  # else some steps lack it, and a mean over all steps would be wrong
            told["hard_loss"] = own["loss"].detach()
        return {**own, "loss": self.hard_weight * own["loss"] + loss, "parts": {**own.get("parts", {}), **told}}

    @contextmanager
    def _listening(self, heard: _StudentActivations) -> Iterator[None]:
        self._heard = heard
        try:
            yield
        finally:
            self._heard = None

    def _targets(self, batch: Any, positions: torch.Size) -> tuple[Tensor, Tensor | None]:
        """Return the mask of positions that count, and the class of each [*positions]; None where targets are
        distributions.
        """
        targets: Tensor = cast(Any, self).targets(batch)
        if targets.shape == positions and not targets.is_floating_point():
            return targets != IGNORE_INDEX, targets.clamp(min=0)
        if targets.shape[:-1] != positions:
            raise ValueError(
                f"--model.student: its targets {list(targets.shape)} are neither classes nor distributions over them at the"
                f" positions {list(positions)} of its features: it cannot be distilled"
            )
        return torch.ones(positions, dtype=torch.bool, device=targets.device), None

    def _compare_predictions(
        self, features: Tensor, logits: list[Tensor], said: list[Tensor], counted: Tensor, classes: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the terms that compare predictions, by name.

        Args:
            features: the student's features [..., D].
            logits: the logits of the student's own step: [..., K], or in chunks.
            said: teacher outputs for all positions; see `TeacherOutputs.hear`.
            counted: positions [...], bool.
            classes: of the positions [...]; None where targets are distributions.
        """
        terms = {name: term for name, term in self.terms.items() if isinstance(term, PredictionTerm)}
        if not terms:
            return {}
        if classes is None and self.lessons.needs_classes:
            raise ValueError("--model.losses: DKD needs the class of each sample, not a distribution: take KD")
        whole = len(logits) == 1 and logits[0].shape[:-1].numel() == counted.numel()
        student = logits[0] if whole else features
        classes = torch.zeros_like(counted, dtype=torch.int64) if classes is None else classes
        rows = [student.flatten(0, -2), counted.flatten(), classes.flatten(), *said]
        # On other devices, indexing with a mask would wait for the device to count its entries.
        if counted.device.type == "cpu" and not counted.all():
            rows = [row[counted.flatten()] for row in rows]
        step, total = self.trainer.global_step, self._num_steps
        temperatures = [term.temperature_at(step, total) for term in terms.values()]

        def loss_of(student: Tensor, counted: Tensor, classes: Tensor, *said: Tensor) -> Tensor:
            logits = student if whole else self.logits(student)
            both = {T: self.lessons.log_probabilities(logits, list(said), T) for T in set(temperatures)}
            sums = []
            for term, temperature in zip(terms.values(), temperatures, strict=True):
                values = term(*both[temperature], classes, temperature)
                if values.ndim > 1:  # one value per label: take the mean, as the student's own loss does
                    values = values.mean(-1)
                sums.append(counted_sum(values, counted))
            return torch.stack(sums)

        return dict(zip(terms, sum_in_chunks(loss_of, rows, None if whole else self.chunk_size), strict=True))

    # A checkpoint holds the learned parameters of the terms separately from the student.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        weights = checkpoint["state_dict"]
        learned = {name: weights.pop(name) for name in list(weights) if name.startswith(f"{_TERMS}.")}
        checkpoint.setdefault("bigmodel", {})["distillation"] = {
            "teachers": self.lessons.identities,
            "cache": self.lessons.keys,
            "learned": learned,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint.get("bigmodel", {}).get("distillation") or checkpoint.get("distillation")  # its earlier place
        if kept is None:
            return
        # There is no trainer when a run is evaluated: then the task reads its checkpoint before it has a net.
        trainer = attached_trainer(self)
        if trainer is None or not trainer.training:  # present if this very student was trained before
            own = self.state_dict().keys()
            checkpoint["state_dict"].update({name: kept["learned"][name] for name in kept["learned"].keys() & own})
            return
        if kept["teachers"] != self.lessons.identities:
            given = " ".join(self.lessons.paths) or type(self.lessons.mean_teacher).__name__
            raise ValueError(
                f"--model.teacher {given} is not the teacher that this run was distilled from: its weights are others"
            )
        self.lessons.check_cache(kept["cache"])
        checkpoint["state_dict"].update(kept["learned"])


def _shares(batch: Any, counted: Tensor) -> Tensor:
    """Return the weights of positions [B] or [B, T].

    Where a text is one sample, each of its tokens has an equal share of the sample; padding tokens have 0.
    """
    mask = getattr(batch, "mask", None)
    if mask is None or mask.ndim != 2 or counted.ndim != 1:
        return counted
    return counted[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1)


def _check_on_policy(student: LightningModule, terms: list[Term], cache: TeacherCache | None) -> None:
    if not isinstance(student, SupportsOnPolicySampling):
        raise ValueError(
            f"--model.on_policy: {type(student).__name__} writes no batches"
            " (bigmodel.protocols.SupportsOnPolicySampling): leave it out"
        )
    if cache is not None:
        raise ValueError(
            "--model.on_policy: what the student writes is new in each step, and --model.cache keeps what the teacher says"
            " of the data: leave out one of the two"
        )
    predicting = [term for term in terms if isinstance(term, PredictionTerm)]
    if not predicting or any(term.needs_classes for term in predicting):
        raise ValueError(
            "--model.on_policy: what the student writes has no classes but what the teacher says: set --model.losses to"
            " GeneralizedJSD or KD, without DKD"
        )


class _StudentActivations:
    """Activations recorded during the student's own step."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        self.logits: list[Tensor] = []
