"""Distillation: train a student on the predictions of a trained teacher, in addition to the data.

    loss = hard_weight * the student's own loss + sum over terms of weight * term

Any task that *SupportsLogits* can be teacher or student. The result is a run of the student: its checkpoints are those
of the plain task.

B samples, n positions (samples, or the tokens of all sequences), D width of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from bigmodel.data.sampling import sequential_loader
from bigmodel.data.schedule import num_steps
from bigmodel.nn.loss import IGNORE_INDEX
from bigmodel.protocols import SupportsLogits, SupportsOnPolicySampling
from bigmodel.run import sizes
from bigmodel.tasks.distillation.cache import TeacherCache
from bigmodel.tasks.distillation.loss_terms import KD, FeatureTerm, PredictionTerm, RegressionTerm, SquaredError, Term
from bigmodel.tasks.distillation.losses import counted_sum, sum_in_chunks
from bigmodel.tasks.distillation.mean_teacher import MeanTeacher
from bigmodel.tasks.distillation.on_policy import OnPolicy
from bigmodel.tasks.distillation.task_wrapper import TaskWrapper
from bigmodel.tasks.distillation.teacher_outputs import TeacherOutputs
from bigmodel.tasks.distillation.teachers import LayerRecorder, eval_mode, problem_type_of

_TERMS = "distillation_terms"  # a submodule of the student; checkpoints hold its parameters separately


class Distillation(TaskWrapper):
    """Trains a student with a teacher, and evaluates it as the student's task does.

    Args:
        student: the task to be trained, with its net, optimizer and schedule.
        teacher: a trained task: a run directory, `last`, the end of a run's name, or a checkpoint; a model in Hugging
            Face's format, its folder or hf://owner/name; or several, whose probabilities are averaged. Or MeanTeacher:
            an average of the student.
        losses: terms by name: KD (by default, with weight 0.9), DKD, GeneralizedJSD; for regression SquaredError (by
            default, with weight 0.9), HuberError; Hint, AttentionTransfer, Relational, SimilarityPreserving; all of
            bigmodel.tasks.distillation; null removes one.
        hard_weight: factor of the student's own loss, 0 or above.
        cache: on-disk cache of the teacher's logits: bigmodel.tasks.distillation.TeacherCache; null: run the teacher at
            each step.
        on_policy: let the student generate a share of the batches: bigmodel.tasks.distillation.OnPolicy; null: all are
            from the data.
        chunk_size: positions whose logits are in memory at once, for a large vocabulary; null: all of a micro-batch.
    """

    trained_submodule = "student"  # the argument whose checkpoints are saved

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
                f"--model.student {type(student).__name__} has no methods features, logits and targets: set another student"
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
        super().__init__(student)
        # In the student, so that the optimizer that it configures includes their parameters.
        student.add_module(_TERMS, nn.ModuleDict(terms))
        self.teacher_outputs = TeacherOutputs(teacher, list(terms.values()), cache)
        self.hard_weight, self.chunk_size, self.on_policy = hard_weight, chunk_size, on_policy
        self._student_layers: LayerRecorder | None = None
        self._num_steps = -1
        self._default_losses = losses is None
        self._scale = 1.0  # of the errors of `RegressionTerm`

    @property
    def terms(self) -> dict[str, Term]:
        """The loss terms, by name."""
        return dict(getattr(self.student, _TERMS).items())

    @property
    def _is_fitting(self) -> bool:
        try:
            return bool(self.trainer.training)
        except RuntimeError:  # not attached to a trainer
            return False

    def configure_callbacks(self) -> list[Callback]:
        callbacks = self.call_student(self.student.configure_callbacks)
        own = [self.teacher_outputs.mean_teacher] if self.teacher_outputs.mean_teacher is not None else []
        return [*([callbacks] if isinstance(callbacks, Callback) else callbacks), *own]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            if self.teacher_outputs.mean_teacher is not None and isinstance(
                self.trainer.strategy, ModelParallelStrategy
            ):
                raise ValueError(
                    "--model.teacher MeanTeacher averages a net that is whole on each process, and --trainer.strategy"
                    f" {type(self.trainer.strategy).__name__} shards it: set one of the two to another value"
                )
            if self._default_losses and problem_type_of(self.student) == "regression":
                terms: dict[str, Term] = {"squared_error": SquaredError(weight=0.9)}
                setattr(self.student, _TERMS, nn.ModuleDict(terms))
                self.teacher_outputs.set_terms(list(terms.values()))
            if self.on_policy is not None:
                self.on_policy.check(sizes(self.student))
            with torch.random.fork_rng(devices=[]):  # same initial weights as without distillation
                self.teacher_outputs.load(self.student)
                self.teacher_outputs.check_disk()

    def configure_model(self) -> None:
        made = self.student.net is not None
        self.call_student(self.student.configure_model)
        if made or not self._is_fitting:
            return
        mean_teacher = self.teacher_outputs.mean_teacher
        feature_terms = [term for term in self.terms.values() if isinstance(term, FeatureTerm)]
        if mean_teacher is not None:
            mean_teacher.copy_student(self.student, without=_TERMS)
            self.teacher_outputs.set_teachers([mean_teacher.task])
        if feature_terms:
            names = {term.student for term in feature_terms if term.student is not None}
            self._student_layers = LayerRecorder(self.student.net, names, "student")
            self._prepare(feature_terms, self._student_layers)

    def _prepare(self, terms: list[FeatureTerm], layers: LayerRecorder) -> None:
        """Run a sample through both nets, and pass the shapes to the terms."""
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009
        loader = sequential_loader(data.train_dataloader(), rows=1)
        batch = self.trainer.strategy.batch_to_device(next(iter(loader)), torch.device("cpu"))
        with eval_mode(self.student):
            student = layers.pop(self.student.features(batch))
            _, teacher = self.teacher_outputs.get(batch)
        for term in terms:
            term.prepare(student[term.student].shape, teacher[term.teacher].shape)

    def on_fit_start(self) -> None:
        self.call_student(self.student.on_fit_start)
        self._num_steps = num_steps(self.trainer)
        ending = [name for name, term in self.terms.items() if term.is_scheduled]
        if self._num_steps < 0 and ending:
            raise ValueError(
                f"--model.losses.{ending[0]} has a schedule, which ends with the run, and the run has no end: set"
                " --trainer.max_steps or --trainer.max_epochs"
            )
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        optimized = {id(parameter) for group in groups for parameter in group["params"]}
        if any(id(parameter) not in optimized for parameter in getattr(self.student, _TERMS).parameters()):
            raise ValueError(
                f"--model.losses: the optimizer of {type(self.student).__name__} lacks the parameters of terms, such as the"
                f" regressor of Hint: include the submodule `{_TERMS}` in its configure_optimizers, or set other losses"
            )
        self.teacher_outputs.setup(self.student)
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009
        if self.teacher_outputs.of_numbers and hasattr(data, "target_statistics"):
            self._scale = float(data.target_statistics()[1])

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Read the cached teacher outputs while the batch is still on the CPU."""
        if self.trainer.training:
            self.teacher_outputs.read_ahead(batch)
        return self.call_student(self.student.on_before_batch_transfer, batch, dataloader_idx)

    def log_trainable_parameters(self) -> None:
        """Print the student's own summary, and its teachers."""
        if (own := getattr(self.student, "log_trainable_parameters", None)) is not None:
            own()
        for teacher in self.teacher_outputs.describe():
            print(f"teacher    {teacher}", flush=True)

    def training_step(self, batch: Any) -> dict[str, Any]:
        """Return the weighted sum of the student's own loss and the terms, and the count of the own loss.

        The unweighted losses are returned as `parts`. A batch that the student has generated has no ground truth: the
        student's own loss is left out there.
        """
        student, recorded, own = self.student, _Activations(), None
        step = self.trainer.global_step
        generated = self.on_policy is not None and self.on_policy.is_on_policy(step)
        if self.on_policy is not None and generated:
            batch = self.on_policy.sample(student, batch, step)
        if self.hard_weight and not generated:
            with _record_activations(student, recorded):
                own = self.call_student(student.training_step, batch)
        features = recorded.features if recorded.features is not None else student.features(batch)
        layers = self._student_layers.pop(features) if self._student_layers is not None else {}
        counted, classes = self._targets(batch, features.shape[:-1])
        teacher_rows, teacher_layers = self.teacher_outputs.get(batch)
        parts = self._compare_predictions(features, recorded.logits, teacher_rows, counted, classes)
        shares = _shares(batch, counted) if layers else counted
        for name, term in self.terms.items():
            if isinstance(term, FeatureTerm):
                parts[name] = term(layers[term.student], teacher_layers[term.teacher], shares)
        loss = sum(term.weight_at(step, self._num_steps) * parts[name] for name, term in self.terms.items())
        logged = {f"{name}_loss": value.detach() for name, value in parts.items()}
        if own is None:
            return {"loss": loss, "count": counted.sum(), "parts": logged}
        if self.on_policy is None:  # else some steps lack it, and a mean over all steps would be wrong
            logged["hard_loss"] = own["loss"].detach()
        return {**own, "loss": self.hard_weight * own["loss"] + loss, "parts": {**own.get("parts", {}), **logged}}

    def _targets(self, batch: Any, positions: torch.Size) -> tuple[Tensor, Tensor | None]:
        """Return the mask of positions that count, and the class of each [*positions]; None where targets are
        distributions or numbers.
        """
        targets: Tensor = self.student.targets(batch)
        if targets.shape == positions and not targets.is_floating_point():
            return targets != IGNORE_INDEX, targets.clamp(min=0)
        if positions not in (targets.shape, targets.shape[:-1]):
            raise ValueError(
                f"--model.student {type(self.student).__name__} has targets {list(targets.shape)} and features at the"
                f" positions {list(positions)}: targets must be classes, distributions over"
                " them, or numbers, at these positions"
            )
        return torch.ones(positions, dtype=torch.bool, device=targets.device), None

    def _compare_predictions(
        self, features: Tensor, logits: list[Tensor], teacher: list[Tensor], counted: Tensor, classes: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the terms that compare predictions, by name.

        Args:
            features: the student's features [..., D].
            logits: the logits of the student's own step: [..., K], or in chunks.
            teacher: teacher outputs for all positions; see `TeacherOutputs.get`.
            counted: positions [...], bool.
            classes: of the positions [...]; None where targets are distributions.
        """
        compared = RegressionTerm if self.teacher_outputs.of_numbers else PredictionTerm
        terms = {name: term for name, term in self.terms.items() if isinstance(term, compared)}
        if not terms:
            return {}
        if classes is None and self.teacher_outputs.needs_classes:
            raise ValueError("--model.losses: DKD needs the class of each sample, not a distribution: set KD")
        whole = len(logits) == 1 and logits[0].shape[:-1].numel() == counted.numel()
        student = logits[0] if whole else features
        classes = torch.zeros_like(counted, dtype=torch.int64) if classes is None else classes
        rows = [student.flatten(0, -2), counted.flatten(), classes.flatten(), *teacher]
        # On other devices, indexing with a mask would wait for the device to count its entries.
        if counted.device.type == "cpu" and not counted.all():
            rows = [row[counted.flatten()] for row in rows]
        compare = self._errors if self.teacher_outputs.of_numbers else self._divergences

        def loss_of(student: Tensor, counted: Tensor, classes: Tensor, *teacher: Tensor) -> Tensor:
            logits = student if whole else self.student.logits(student)
            values = compare(list(terms.values()), logits, list(teacher), classes)
            return torch.stack([counted_sum(value, counted) for value in values])

        return dict(zip(terms, sum_in_chunks(loss_of, rows, None if whole else self.chunk_size), strict=True))

    def _errors(self, terms: list[Any], student: Tensor, teacher: list[Tensor], classes: Tensor) -> list[Tensor]:
        """Return the values [n] of each `RegressionTerm` for logits [n, K]."""
        errors = (student.float() - self.teacher_outputs.numbers(teacher)) / self._scale
        return [term(errors).mean(-1) for term in terms]

    def _divergences(self, terms: list[Any], student: Tensor, teacher: list[Tensor], classes: Tensor) -> list[Tensor]:
        """Return the values [n] of each `PredictionTerm` for logits [n, K]."""
        step, total = self.trainer.global_step, self._num_steps
        temperatures = [term.temperature_at(step, total) for term in terms]
        both = {T: self.teacher_outputs.log_probabilities(student, teacher, T) for T in set(temperatures)}
        values = [term(*both[T], classes, T) for term, T in zip(terms, temperatures, strict=True)]
        # One value per label: take the mean, as the student's own loss does.
        return [value.mean(-1) if value.ndim > 1 else value for value in values]

    # A checkpoint holds the learned parameters of the terms separately from the student.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.call_student(self.student.on_save_checkpoint, checkpoint)
        weights = checkpoint["state_dict"]
        learned = {name: weights.pop(name) for name in list(weights) if name.startswith(f"{_TERMS}.")}
        checkpoint.setdefault("bigmodel", {})["distillation"] = {
            "teachers": self.teacher_outputs.identities,
            "cache": self.teacher_outputs.keys,
            "learned": learned,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.call_student(self.student.on_load_checkpoint, checkpoint)
        saved = checkpoint.get("bigmodel", {}).get("distillation") or checkpoint.get(
            "distillation"
        )  # its earlier place
        if saved is None:
            return
        # A task that is evaluated reads its checkpoint before it has a net, and without a trainer. It has terms only if it
        # was trained by this same object before.
        if not self._is_fitting:
            own = self.state_dict().keys()
            checkpoint["state_dict"].update({name: saved["learned"][name] for name in saved["learned"].keys() & own})
            return
        if saved["teachers"] != self.teacher_outputs.identities:
            given = " ".join(self.teacher_outputs.paths) or type(self.teacher_outputs.mean_teacher).__name__
            raise ValueError(
                f"--model.teacher {given} has weights different from those of the teacher that this run was distilled from"
            )
        self.teacher_outputs.check_cache(saved["cache"])
        checkpoint["state_dict"].update(saved["learned"])


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
            f"--model.on_policy: {type(student).__name__} has no method sample_on_policy"
            " (bigmodel.protocols.SupportsOnPolicySampling): set --model.on_policy null"
        )
    if cache is not None:
        raise ValueError(
            "--model.on_policy generates new tokens in each step, and --model.cache holds the teacher's outputs for the"
            " data: set one of the two to null"
        )
    predicting = [term for term in terms if isinstance(term, PredictionTerm)]
    if not predicting or any(term.needs_classes for term in predicting):
        raise ValueError(
            "--model.on_policy: generated tokens have no classes, only the teacher's predictions: set --model.losses to"
            " GeneralizedJSD or KD, without DKD"
        )


@dataclass
class _Activations:
    """Features and logits of the student's own training step."""

    features: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)


@contextmanager
def _record_activations(student: Any, recorded: _Activations) -> Iterator[None]:
    """Record what the student's methods `features` and `logits` return, so that it is computed once a step.

    A wrapper cannot intercept the calls that the student's own training step makes: they are recorded by functions that
    replace the methods on this instance during the step.
    """
    compute_features, compute_logits = student.features, student.logits

    def features(batch: Any) -> Tensor:
        recorded.features = computed = compute_features(batch)
        return computed

    def logits(features: Tensor) -> Tensor:
        recorded.logits.append(computed := compute_logits(features))
        return computed

    student.features, student.logits = features, logits
    try:
        yield
    finally:
        del student.features, student.logits
