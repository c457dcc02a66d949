"""Transfer learning: fine-tune a pretrained net for a new task.

Losses, sums over samples: cross-entropy in nats where a sample has one class; binary cross-entropy in nats, the mean over
the labels, where it may have several; squared error in units of the training targets' variance where it has a number.

B samples, T tokens, D width of the features, K classes or labels (1 for a number).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from bigmodel.data.cache import first_of
from bigmodel.evaluation import Report
from bigmodel.internals import attached_trainer, limit_to_one_step
from bigmodel.run import set_sizes, sizes
from bigmodel.tasks.transfer_learning import param_groups as groups
from bigmodel.tasks.transfer_learning.backbones import build_backbone, find_text_encoder, rebuild
from bigmodel.tasks.transfer_learning.inference import Picture, Sample, format_predictions, predict
from bigmodel.tasks.transfer_learning.methods import WORDS, Method, find_method
from bigmodel.tasks.transfer_learning.methods.base import eval_frozen_modules
from bigmodel.tasks.transfer_learning.methods.feature_cache import FeatureBatch
from bigmodel.tasks.transfer_learning.metrics import Problem, TransferMetrics, make_metrics
from bigmodel.tasks.transfer_learning.net import TransferNet
from bigmodel.tasks.transfer_learning.penalties import Penalty
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder
from bigmodel.training import optimizers, schedules
from bigmodel.training.callbacks import GradientScaling
from bigmodel.training.callbacks.gradient_scaling import get_callback

Word = Literal["full", "linear_probe", "knn_probe", "gradual", "lora", "bias_only"]


class TransferLearning(LightningModule):
    """Fine-tunes a pretrained backbone with a new head on labelled texts or images.

    Args:
        backbone: a run directory of a task that predicts, a folder with a Hugging Face model, or owner/name on the hub.
        method: which parameters train, and when: full, linear_probe, knn_probe, gradual, lora, bias_only; or a Method
            with settings, such as `--model.method lora --model.method.rank 16`.
        layers: indices of the layers to keep, from 0, of a Hugging Face text model: a smaller net from a trained
            one, as a student in distillation; null: all.
        pretrained: use the pretrained weights; false: the same architecture with new weights, as a control.
        excuse: patterns (`*` as in file names) of weights that may be missing, unexpected or of another shape.
        allow_pickle: also read weights from pickles, which can run any code; only for files that you trust.
        pooling: of the features of tokens to those of a text: first (class token), mean, last, attention (learned), or
            auto, the pooling that the backbone was pretrained with.
        dropout: between the features and the head, in [0, 1); in training only.
        layer_decay: the learning rate of a layer is that of the layer above times this, in (0, 1]; the head uses the
            optimizer's.
        penalty: penalty on the weights that is added to the mean loss: L2SP, L1.
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; null: constant.

    Logs the metrics that `make_metrics` returns for the problem, which the data determine, as `val/...` and `test/...`.
    """

    count_unit = "samples"  # unit of the count that training_step returns
    # So that a method given as a word can have settings.
    aliases: ClassVar = {"method": {word: f"{kind.__module__}.{kind.__qualname__}" for word, kind in WORDS.items()}}

    def __init__(
        self,
        backbone: str,
        method: Word | Method = "full",
        layers: list[int] | None = None,
        pretrained: bool = True,
        excuse: list[str] | None = None,
        allow_pickle: bool = False,
        pooling: Literal["auto", "first", "mean", "last", "attention"] = "auto",
        dropout: float = 0.1,
        layer_decay: float = 1.0,
        penalty: Penalty | None = None,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"--model.dropout {dropout} must lie in 0 <= dropout < 1")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"--model.layer_decay {layer_decay} must lie in 0 < layer_decay <= 1; 1: all layers alike")
        self.backbone, self.layers, self.pretrained, self.excuse = backbone, layers, pretrained, excuse or []
        self.allow_pickle, self.pooling, self.dropout = allow_pickle, pooling, dropout
        self.method, self.layer_decay, self.penalty = find_method(method), layer_decay, penalty
        self.optimizer, self.schedule = optimizer, schedule
        self.net: Any = None
        self.metrics: Any = None
        self.facts: dict[str, Any] = {}  # facts about the data, as in the checkpoint
        self.description: dict[str, Any] | None = None  # description of the backbone, from a checkpoint
        self._text_encoder: TextEncoder | None = None

    # Facts about the data, and requirements on the data.

    @property
    def problem(self) -> Problem:
        """Type of the targets: a class, labels, or a number."""
        problem: Problem = self.facts.get("problem", "class")
        return problem

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The backbone's tokenizer; None if it reads images. Available before the net is built."""
        if self.net is not None:
            encoder: TextEncoder | None = self.net.backbone.text_encoder
            return encoder
        if self._text_encoder is None:
            self._text_encoder = find_text_encoder(
                self.backbone, pretrained=self.pretrained, allow_pickle=self.allow_pickle
            )
        return self._text_encoder

    def setup(self, stage: str) -> None:
        """Read the facts about the data from the data module, and check that the method supports them."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "predict" and hasattr(data, "classes"):
            center, scale = data.target_statistics() if hasattr(data, "target_statistics") else (0.0, 1.0)
            self.facts = {
                "classes": list(data.classes),
                "problem": getattr(data, "problem", "class"),
                "center": center,
                "scale": scale,
                **{name: getattr(data, name) for name in ("max_length", "size", "resize") if hasattr(data, name)},
            }
        if stage == "fit":
            if self.penalty is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
                raise ValueError(
                    "--model.penalty is not for sharded nets: set --trainer.strategy ddp, or the penalty null"
                )
            self.method.setup(self)
            if not self.method.optimizes:
                self._take_one_step()

    def _take_one_step(self) -> None:
        """Limit the run to one optimizer step and a validation."""
        trainer = self.trainer
        limit_to_one_step(trainer)
        trainer.val_check_interval, trainer.check_val_every_n_epoch = trainer.accumulate_grad_batches, None

    # The net.

    def configure_model(self) -> None:
        if self.net is not None:
            return
        known = sizes(self)
        if self.description is not None:
            backbone = rebuild(self.description)
        else:
            backbone = build_backbone(
                self.backbone,
                pretrained=self.pretrained,
                excuse=self.excuse,
                allow_pickle=self.allow_pickle,
                data_sizes=known,
                layers=self.layers,
            )
        pretrained = dict(backbone.named_parameters())
        self.net = TransferNet(backbone, known["num_classes"], pooling=self.pooling, dropout=self.dropout)
        self.method.prepare(self.net, self.problem)
        if self.penalty is not None and self._fits:
            self.penalty.start(pretrained, dict(self.method.trained(self.net)))
        self.metrics = self.new_metrics()
        self.train()

    @property
    def _fits(self) -> bool:
        trainer = attached_trainer(self)
        return trainer is not None and bool(trainer.state.fn == TrainerFn.FITTING)

    def new_metrics(self) -> TransferMetrics:
        """Return metrics for this problem, on this device."""
        metrics: Any = make_metrics(self.problem, sizes(self)["num_classes"])
        return metrics.to(self.device)

    def train(self, mode: bool = True) -> TransferLearning:
        """Set training mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        if mode and self.net is not None:
            eval_frozen_modules(self.net.backbone)
        return self

    def configure_callbacks(self) -> list[Callback]:
        # The loss is a sum: a plain Trainer also needs the callback that divides it by the count.
        missing = [kind for kind in (GradientScaling, Report) if get_callback(self.trainer, kind) is None]
        return [kind() for kind in missing]

    def configure_optimizers(self) -> Any:
        if not self.method.optimizes:
            return torch.optim.SGD([p for _, p in self.method.trained(self.net)], lr=0.0)
        # Subclasses may have parameters outside the net.
        beside = nn.ModuleList(child for name, child in self.named_children() if name != "net")
        chosen = [*groups.parameter_groups(self._layers()), *optimizers.parameter_groups(beside)]
        return optimizers.configure(self, self.optimizer, self.schedule, chosen)

    def _layers(self) -> list[groups.LayerGroup]:
        trained = [parameter for _, parameter in self.method.trained(self.net)]
        return groups.layer_groups(self.net, trained, self.layer_decay, self.method.by_layer)

    def log_trainable_parameters(self) -> None:
        """Print the parameter groups with their learning rates; call it when there are optimizers."""
        if self.method.optimizes:
            settings = self.trainer.optimizers[0].defaults
            groups.show(self._layers(), settings, self.method.joins(self))

    # The SupportsLogits protocol, used by distillation, evaluation and export.

    def features(self, batch: Any) -> Tensor:
        """Return pooled features [B, D], before dropout."""
        features: Tensor = batch.features if isinstance(batch, FeatureBatch) else self.net.features(batch)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]; for numbers [..., 1], in the unit of the targets."""
        logits: Tensor = self.net.logits(features)
        if self.problem == "number" and self.method.optimizes:
            logits = logits.float() * self.facts["scale"] + self.facts["center"]
        return logits

    def targets(self, batch: Any) -> Tensor:
        """Return class indices [B] or, where images were mixed, distributions [B, K]; 0 and 1 [B, K]; or numbers [B]."""
        targets: Tensor = batch.targets
        return targets

    @property
    def label_space(self) -> list[str] | None:
        """The classes or labels, in the order of the logits; None for a number."""
        return self.facts.get("classes") or None

    def from_pretrained(self, path: str, flag: str) -> TransferLearning:
        """Load a text classifier of transformers with this task's classes, as it was trained; see
        `bigmodel.protocols.SupportsFromPretrained`.
        """
        from bigmodel.tasks.transfer_learning.hugging_face import as_published

        task = TransferLearning(backbone=path)
        task.net = as_published(
            path,
            flag,
            classes=self.facts["classes"],
            problem=self.problem,
            text_encoder=self.text_encoder,
            max_length=self.facts.get("max_length"),
        )
        task.facts = self.facts
        set_sizes(task, sizes(self))
        return task.eval()

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample [B] from logits [B, K]."""
        if self.problem == "class":
            return F.cross_entropy(logits, targets, reduction="none")
        if self.problem == "labels":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
        return ((logits[:, 0] - targets) / self.facts["scale"]).square()

    def training_step(self, batch: Any) -> dict[str, Any]:
        count = len(batch.index)
        if not self.method.optimizes:
            return {"loss": sum(p.sum() for _, p in self.method.trained(self.net)) * 0.0, "count": count}
        logits = self.logits(self.features(batch)).float()
        loss = (self.losses(logits, batch.targets) * batch.weight).sum()
        if self.penalty is not None:
            loss = loss + count * self.penalty()
        return {"loss": loss, "count": count}

    def validation_step(self, batch: Any) -> dict[str, Tensor]:
        """Return index, loss, target and prediction with its probability for each sample; used by `Report`."""
        real = batch.weight > 0
        logits = self.logits(self.features(batch)).float()[real]
        targets = batch.targets[real]
        self.metrics.update(logits, targets)
        found = {"index": batch.index[real], "loss": self.losses(logits, targets), "target": targets}
        if self.problem == "class":
            probability, predicted = logits.softmax(-1).max(-1)
            return {**found, "predicted": predicted, "probability": probability}
        if self.problem == "labels":
            return {**found, "predicted": (logits > 0).float(), "probability": logits.sigmoid()}
        return {**found, "predicted": logits[:, 0]}

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val", self.metrics)

    def test_step(self, batch: Any) -> dict[str, Tensor]:
        return self.validation_step(batch)

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test", self.metrics)

    def log_metrics(self, split: str, metrics: TransferMetrics) -> None:
        """Log the metrics over all processes, and reset them."""
        for name, value in metrics.compute().items():
            self.log(f"{split}/{name}", value.to(torch.float32), sync_dist=True)
        metrics.reset()

    # Hooks of the method.

    def on_fit_start(self) -> None:
        self.method.on_fit_start(self)

    def on_train_start(self) -> None:
        self.method.on_train_start(self)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.method.before_transfer(self, batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.method.on_train_batch_start(self, batch_idx)

    def on_after_backward(self) -> None:
        self.method.on_after_backward(self)

    def on_fit_end(self) -> None:
        self.method.on_fit_end(self)

    # The checkpoint holds the facts about the data, so that a loaded task needs neither the data nor the backbone's
    # files.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        encoder = self.text_encoder if self.net.backbone.modality == "text" else None
        checkpoint["transfer"] = {
            "facts": self.facts,
            "backbone": self.net.backbone.description,
            "text_encoder": encoder.to_plain() if encoder is not None else None,
            "method": self.method.state_dict(),
            "penalty": self.penalty.identity() if self.penalty is not None else "",
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint["transfer"]
        facts = kept["facts"]
        if self.facts and (self.problem, self.facts["classes"]) != (facts["problem"], facts["classes"]):
            raise ValueError(f"the data are not of the kind that was learned: {_kind(self.facts)}, not {_kind(facts)}")
        if self.penalty is not None and self._fits and kept["penalty"] != self.penalty.identity():
            raise ValueError(
                f"--model.backbone {self.backbone} has other weights than when this run began, and --model.penalty draws to"
                " those: put the old ones back, or set --model.penalty null"
            )
        self.facts, self.description = facts, kept["backbone"]
        if kept["text_encoder"] is not None and self.net is None:
            self._text_encoder = TextEncoder.from_plain(kept["text_encoder"])
        self.method.load_state_dict(kept["method"], self.net)

    def restore_metadata(self, checkpoint: dict[str, Any]) -> None:
        """Restore everything but the weights from a checkpoint, before data are prepared and the net is built.

        This includes the type of the targets, the tokenizer, and the backbone's architecture, so that its files are not
        needed.
        """
        self.on_load_checkpoint(checkpoint)

    # Inference.

    def merged_model(self) -> TransferNet:
        """Return the net with the changes of its method (such as LoRA) merged into its weights."""
        self.method.merge(self.net)
        net: TransferNet = self.net
        return net

    def predict_step(self, batch: Any) -> dict[str, Any]:
        """Return the predictions for each sample, with the sample itself (`text`, or the `path` of the image).

        For one class: `class`, its `probability`, and the `probabilities` [n, K] of all. For several labels: `labels`
        (lists) and `probabilities` [n, K]. Otherwise: the `number`.
        """
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009
        real = batch.weight > 0
        logits = self.logits(self.features(batch)).float()[real]
        numbers = batch.index[real].tolist()
        if self.net.backbone.modality == "text":
            texts = data.texts("all")
            columns: dict[str, Any] = {"text": [texts.text(i) for i in numbers]}
            if texts.paired:
                columns["pair"] = [texts.pair(i) for i in numbers]
        else:
            images = data.images("all")
            columns = {"path": [images.name(i) for i in numbers]}
        return columns | format_predictions(logits, self.problem, self.facts["classes"])

    def prediction_metadata(self) -> dict[str, str]:
        """Metadata of a file of predictions: the classes, in the order of `probabilities`, as JSON."""
        return {"classes": json.dumps(self.facts["classes"])}

    def forward(self, samples: Tensor | Sample | Sequence[Sample]) -> Any:
        """Predict for texts or images, whichever the backbone reads.

        Args:
            samples: a text, a pair of texts (a tuple), or an image (a PIL image, its path, or pixels [H, W] or [H, W,
                C] of uint8); or several.

        Returns:
            The classes or labels with their probabilities, the most likely first; or the number. For several samples, a
            list.
        """
        if isinstance(samples, str | tuple | Picture):
            return predict(self, [samples])[0]
        return predict(self, list(samples))


def _kind(facts: dict[str, Any]) -> str:
    names = facts["classes"]
    return f"{facts['problem']}{f' ({first_of(names, 8)})' if names else ''}"
