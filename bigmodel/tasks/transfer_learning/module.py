"""Transfer learning: fine-tune a pretrained net for a new task.

B samples, T tokens, D width of the features, K classes or labels (1 for regression).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from bigmodel.evaluation import Report
from bigmodel.run import set_sizes, sizes
from bigmodel.tasks.transfer_learning import param_groups as groups
from bigmodel.tasks.transfer_learning.backbones import build_backbone, find_text_encoder, rebuild
from bigmodel.tasks.transfer_learning.data_metadata import check_targets, collect_metadata, read_metadata
from bigmodel.tasks.transfer_learning.inference import (
    ImageInput,
    Sample,
    format_predictions,
    predict,
    prediction_columns,
)
from bigmodel.tasks.transfer_learning.losses import sample_losses, sample_predictions
from bigmodel.tasks.transfer_learning.methods import METHODS, Method, find_method
from bigmodel.tasks.transfer_learning.methods.base import eval_frozen_modules
from bigmodel.tasks.transfer_learning.methods.feature_cache import FeatureBatch, FeatureCaching
from bigmodel.tasks.transfer_learning.metrics import TransferMetrics, make_metrics
from bigmodel.tasks.transfer_learning.net import TransferNet
from bigmodel.tasks.transfer_learning.penalties import Penalty
from bigmodel.tasks.transfer_learning.pooling import PoolingKind
from bigmodel.tasks.transfer_learning.problem_type import REGRESSION, SINGLE_LABEL, ProblemType
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder
from bigmodel.training import optimizers, schedules
from bigmodel.training.callbacks import GradientScaling
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.task import BaseTask

MethodName = Literal["full", "linear_probe", "knn_probe", "gradual", "lora", "bias_only"]


class TransferLearning(BaseTask):
    """Fine-tunes a pretrained backbone with a new head on labelled texts or images.

    Args:
        backbone: a run directory of a task that predicts, a folder with a Hugging Face model, or owner/name on the hub.
        method: which parameters train, and when: full, linear_probe, knn_probe, gradual, lora, bias_only; or a Method
            with settings, such as `--model.method lora --model.method.rank 16`.
        layers: indices of the layers to keep, from 0, of a Hugging Face text model: a smaller net from a trained
            one, as a student in distillation; null: all.
        pretrained: use the pretrained weights; false: the same architecture with new weights, as a control.
        ignore_mismatched: patterns (`*` as in file names) of weights that may be missing, unexpected or of another
            shape.
        allow_pickle: also read weights from pickles, which can run any code; only for files that you trust.
        pooling: of the features of tokens to those of a text: first (class token), mean, last, attention (learned), or
            auto, the pooling that the backbone was pretrained with.
        dropout: between the features and the head, in [0, 1); in training only.
        layer_decay: the learning rate of a layer is that of the layer above times this, in (0, 1]; the head uses the
            optimizer's.
        penalty: penalty on the weights that is added to the mean loss: L2SPPenalty, L1Penalty.
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; null: constant.

    Logs the metrics that `make_metrics` returns for the problem type of the data, as `val/...` and `test/...`.
    """

    callback_types = (GradientScaling, Report)
    # So that a method given by its name can have settings.
    aliases: ClassVar = {"method": {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in METHODS.items()}}

    def __init__(
        self,
        backbone: str,
        method: MethodName | Method = "full",
        layers: list[int] | None = None,
        pretrained: bool = True,
        ignore_mismatched: list[str] | None = None,
        allow_pickle: bool = False,
        pooling: PoolingKind = "auto",
        dropout: float = 0.1,
        layer_decay: float = 1.0,
        penalty: Penalty | None = None,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        if not 0 <= dropout < 1:
            raise ValueError(f"--model.dropout {dropout} must lie in 0 <= dropout < 1")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"--model.layer_decay {layer_decay} must lie in 0 < layer_decay <= 1; 1: all layers alike")
        self.backbone, self.layers, self.pretrained = backbone, layers, pretrained
        self.ignore_mismatched = ignore_mismatched or []
        self.allow_pickle, self.pooling, self.dropout = allow_pickle, pooling, dropout
        self.method, self.layer_decay, self.penalty = find_method(method), layer_decay, penalty
        self.metrics: Any = None
        self.data_metadata: dict[str, Any] = {}  # classes, problem type and geometry of the data, as in the checkpoint
        self.description: dict[str, Any] | None = None  # description of the backbone, from a checkpoint
        self._text_encoder: TextEncoder | None = None
        self._fitting = False

    # Metadata of the data, and requirements on the data.

    @property
    def problem_type(self) -> ProblemType:
        """Type of the targets."""
        found: ProblemType = self.data_metadata.get("problem_type", SINGLE_LABEL)
        return found

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The backbone's tokenizer; None if it reads images. Available before the net is built."""
        if self.net is not None:
            encoder: TextEncoder | None = self.net.backbone.text_encoder
            return encoder
        if self._text_encoder is None:
            options = {"pretrained": self.pretrained, "allow_pickle": self.allow_pickle}
            self._text_encoder = find_text_encoder(self.backbone, **options)
        return self._text_encoder

    def setup(self, stage: str) -> None:
        """Read the metadata of the data module."""
        self._fitting = stage == "fit"
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "predict" and hasattr(data, "classes"):
            self.data_metadata = collect_metadata(data)
        if self._fitting and self.penalty is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "--model.penalty is not supported for sharded nets: set --trainer.strategy ddp, or --model.penalty null"
            )

    # The net.

    def configure_model(self) -> None:
        if self.net is not None:
            return
        data_sizes = sizes(self)
        if self.description is not None:
            backbone = rebuild(self.description)
        else:
            backbone = build_backbone(
                self.backbone,
                pretrained=self.pretrained,
                ignore_mismatched=self.ignore_mismatched,
                allow_pickle=self.allow_pickle,
                data_sizes=data_sizes,
                layers=self.layers,
            )
        pretrained = dict(backbone.named_parameters())
        self.net = TransferNet(backbone, data_sizes["num_classes"], pooling=self.pooling, dropout=self.dropout)
        self.method.wrap(self.net, self.problem_type)
        if self.penalty is not None and self._fitting:
            self.penalty.start(pretrained, dict(self.method.trainable(self.net)))
        self.metrics = self.new_metrics()
        self.train()

    def new_metrics(self) -> TransferMetrics:
        """Return metrics for this problem type, on this device."""
        metrics: Any = make_metrics(self.problem_type, sizes(self)["num_classes"])
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
        return [*(kind() for kind in missing), *self.method.callbacks(self)]

    def configure_optimizers(self) -> Any:
        # Subclasses may have parameters outside the net.
        others = nn.ModuleList(child for name, child in self.named_children() if name != "net")
        chosen = [*groups.parameter_groups(self._layer_groups()), *optimizers.parameter_groups(others)]
        return optimizers.configure(self, self.optimizer, self.schedule, chosen)

    def _layer_groups(self) -> list[groups.LayerGroup]:
        trainable = [parameter for _, parameter in self.method.trainable(self.net)]
        return groups.layer_groups(self.net, trainable, self.layer_decay, self.method.by_layer)

    def log_trainable_parameters(self) -> None:
        """Print the parameter groups with their learning rates; call it when there are optimizers."""
        if self.method.requires_training:
            schedule = self.method.unfreeze_schedule(self.net, optimizers.num_steps(self.trainer))
            groups.print_table(self._layer_groups(), self.trainer.optimizers[0].defaults, schedule)

    # The SupportsLogits protocol, used by distillation, evaluation and export.

    def features(self, batch: Any) -> Tensor:
        """Return pooled features [B, D], before dropout."""
        features: Tensor = batch.features if isinstance(batch, FeatureBatch) else self.net.features(batch)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]; for regression [..., 1], in the unit of the targets."""
        logits: Tensor = self.net.logits(features)
        if self.problem_type == REGRESSION and self.method.requires_training:
            logits = logits.float() * self.data_metadata["scale"] + self.data_metadata["center"]
        return logits

    def targets(self, batch: Any) -> Tensor:
        """Return class indices [B] or, where images were mixed, distributions [B, K]; 0 and 1 [B, K]; or numbers [B]."""
        targets: Tensor = batch.targets
        return targets

    @property
    def label_space(self) -> list[str] | None:
        """The classes or labels, in the order of the logits; None for regression."""
        return self.data_metadata.get("classes") or None

    def from_pretrained(self, path: str, flag: str) -> TransferLearning:
        """Load a published text classifier with this task's classes; see `bigmodel.protocols.SupportsFromPretrained`."""
        from bigmodel.tasks.transfer_learning.hugging_face import as_published

        task = TransferLearning(backbone=path)
        task.net = as_published(
            path,
            flag,
            classes=self.data_metadata["classes"],
            problem_type=self.problem_type,
            text_encoder=self.text_encoder,
            max_length=self.data_metadata.get("max_length"),
        )
        task.data_metadata = self.data_metadata
        set_sizes(task, sizes(self))
        return task.eval()

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each sample [B] from logits [B, K]."""
        return sample_losses(self.problem_type, logits, targets, self.data_metadata.get("scale", 1.0))

    def training_step(self, batch: Any) -> dict[str, Any]:
        count = len(batch.index)
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
        outputs = {"index": batch.index[real], "loss": self.losses(logits, targets), "target": targets}
        return outputs | sample_predictions(self.problem_type, logits)

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val", self.metrics)

    def test_step(self, batch: Any) -> dict[str, Tensor]:
        return self.validation_step(batch)

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test", self.metrics)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Replace the inputs of a batch by their cached features, if there are any."""
        caching = get_callback(self.trainer, FeatureCaching)
        return batch if caching is None else caching.replace_inputs(self.trainer, batch)

    # The checkpoint holds all that a loaded task needs instead of the data and the backbone's files.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        encoder = self.text_encoder if self.net.backbone.modality == "text" else None
        checkpoint["transfer"] = {
            "data_metadata": self.data_metadata,
            "backbone": self.net.backbone.description,
            "text_encoder": encoder.to_dict() if encoder is not None else None,
            "method": self.method.state_dict(),
            "penalty": self.penalty.identity() if self.penalty is not None else "",
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["transfer"]
        metadata = read_metadata(saved)
        check_targets(self.data_metadata or metadata, metadata)
        if self.penalty is not None and self._fitting and saved["penalty"] != self.penalty.identity():
            raise ValueError(
                f"--model.backbone {self.backbone} has other weights than when this run began, and --model.penalty refers"
                " to those: restore them, or set --model.penalty null"
            )
        self.data_metadata, self.description = metadata, saved["backbone"]
        if saved["text_encoder"] is not None and self.net is None:
            self._text_encoder = TextEncoder.from_dict(saved["text_encoder"])
        self.method.load_state_dict(saved["method"], self.net)

    def restore_metadata(self, checkpoint: dict[str, Any]) -> None:
        """Restore all but the weights from a checkpoint, before data are prepared and the net is built: problem type,
        tokenizer, and the architecture of the backbone, so that its files are not needed.
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

        Single-label: `class`, its `probability`, and the `probabilities` [n, K] of all. Multi-label: `labels` (lists)
        and `probabilities` [n, K]. Regression: the `number`.
        """
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009
        real = batch.weight > 0
        logits = self.logits(self.features(batch)).float()[real]
        columns = prediction_columns(data, self.net.backbone.modality, batch.index[real].tolist())
        return columns | format_predictions(logits, self.problem_type, self.data_metadata["classes"])

    def prediction_metadata(self) -> dict[str, str]:
        """Metadata of a file of predictions: the classes, in the order of `probabilities`, as JSON."""
        return {"classes": json.dumps(self.data_metadata["classes"])}

    def forward(self, samples: Tensor | Sample | Sequence[Sample]) -> Any:
        """Predict for texts or images, whichever the backbone reads.

        Args:
            samples: a text, a pair of texts (a tuple), or an image (a PIL image, its path, or pixels [H, W] or [H, W,
                C] of uint8); or several of one kind.

        Returns:
            The classes or labels with their probabilities, the most likely first; for regression the number. For
            several samples, a list.
        """
        if isinstance(samples, str | tuple | ImageInput):
            return predict(self, [samples])[0]
        return predict(self, list(samples))
