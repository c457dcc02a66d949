"""Image classification: predict which of K classes an image shows.

Loss: cross-entropy in nats per image, optionally with label smoothing (Szegedy et al. 2016).

B images, C channels, S pixels of the square's side, D width of the features, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bigmodel.data.cache import first_of
from bigmodel.data.image_decoding import decode
from bigmodel.evaluation import ClassMetrics, Report
from bigmodel.internals import attached_trainer
from bigmodel.nn import ResNet, to_channels_last
from bigmodel.run import set_sizes, sizes
from bigmodel.tasks.image_classification.batch import ImageBatch
from bigmodel.training import optimizers, schedules
from bigmodel.training.callbacks import GradientScaling
from bigmodel.training.task import BaseTask

ImageInput = Image.Image | np.ndarray | str | Path
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow


class ImageClassification(BaseTask):
    """Trains and evaluates a net that maps images [B, C, S, S] to logits [B, K], and classifies images with it.

    Args:
        net: factory of the net, called with `num_classes`, `in_channels` and `image_size` (pixels), taken from the
            data.
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; null: constant.
        label_smoothing: share of each target that is spread evenly over all classes, in [0, 1); in training only.
        mean: per channel, subtracted from images in 0 to 1; null: the net's own, else that of the training images.
        std: per channel, divides the result; null: as for `mean`.
        test_flips: also evaluate the mean prediction of each test image and its mirror image, as `test_flips/...`.

    Logs `val/loss` (nats per image), `val/accuracy`, `val/top5_accuracy`, `val/precision`, `val/recall`, `val/f1`
    (macro), `val/auroc` (macro, one against the rest), `val/calibration_error` (15 bins), and the same for `test`.
    """

    count_unit = "images"
    callback_types = (GradientScaling, Report)

    def __init__(
        self,
        net: Callable[[int, int, int], nn.Module] = ResNet,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
        label_smoothing: float = 0.0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        test_flips: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"--model.label_smoothing {label_smoothing} must be in [0, 1)")
        if (mean is None) != (std is None):
            raise ValueError("--model.mean and --model.std are set together: set both or none")
        self.make_net = net
        self.label_smoothing, self.given_statistics, self.test_flips = label_smoothing, (mean, std), test_flips
        self.mean: Tensor
        self.std: Tensor
        self.data_metadata: dict[str, Any] = {}  # classes and geometry, as in the checkpoint
        self.net_config: dict[str, Any] | None = None  # of a net that was built from files, which may be gone

    def setup(self, stage: str) -> None:
        """Read classes and geometry from the data module."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "predict" and hasattr(data, "classes"):
            self.data_metadata = {"classes": data.classes, "size": data.size, "resize": data.resize}

    def configure_model(self) -> None:
        if self.net is not None:
            return
        net_sizes = sizes(self)
        config = {"config": self.net_config} if self.net_config is not None else {}
        self.net = self.make_net(**net_sizes, **config)  # type: ignore[call-arg]
        to_channels_last(self.net)  # guarded: convolutions of few channels
        mean, std = self._statistics(net_sizes["in_channels"])
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.metrics = ClassMetrics(net_sizes["num_classes"])
        self.flip_metrics = ClassMetrics(net_sizes["num_classes"]) if self.test_flips else None

    def _statistics(self, num_channels: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [C, 1, 1]: as given, else the net's own, else those of the training
        images.
        """
        pair: Any = self.given_statistics
        if pair[0] is None:
            pair = getattr(self.net, "normalization", None)
        if pair is None:
            data = getattr(attached_trainer(self), "datamodule", None)
            prepared = getattr(data, "prepared", None)
            # Without data they are loaded with the weights.
            pair = (
                (prepared.mean, prepared.std) if prepared is not None else ([0.0] * num_channels, [1.0] * num_channels)
            )
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in pair)
        if len(mean) != num_channels or len(std) != num_channels or not (std > 0).all():
            raise ValueError(
                f"--model.mean {pair[0]} and --model.std {pair[1]}: {num_channels} value(s) each are needed for"
                f" images of {num_channels} channel(s), std above 0 (--data.channels sets how images are read)"
            )
        return mean, std

    def normalize(self, images: Tensor) -> Tensor:
        """Convert [B, C, S, S] in 0 to 255 (uint8) or 0 to 1 (float) to normalized float32, the input of the net.

        Grey images are expanded to the three channels of the net; coloured images are made grey for a net of one
        channel.
        """
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.float()
        if images.shape[1] == 3 and len(self.mean) == 1:
            images = (images * images.new_tensor(_LUMINANCE)[:, None, None]).sum(1, keepdim=True)
        return (images - self.mean) / self.std

    # The SupportsLogits protocol, used by distillation, evaluation and export.

    def features(self, batch: ImageBatch) -> Tensor:
        """Return the input of the output layer [B, D]; the logits if the net has no separate output layer."""
        return self.net_features(self.normalize(batch.images))

    def targets(self, batch: ImageBatch) -> Tensor:
        """Return class indices [B], or distributions [B, K] where images were mixed."""
        return batch.targets

    @property
    def label_space(self) -> list[str] | None:
        """The classes, in the order of the logits."""
        return self.data_metadata.get("classes")

    def from_pretrained(self, path: str, flag: str) -> ImageClassification:
        """Load an image classifier of transformers with this task's classes, unchanged; see
        `bigmodel.protocols.SupportsFromPretrained`.
        """
        from bigmodel.tasks.image_classification.hugging_face import as_published

        net_sizes = sizes(self)
        net, channels = as_published(
            path,
            flag,
            classes=self.data_metadata["classes"],
            in_channels=net_sizes["in_channels"],
            image_size=net_sizes["image_size"],
        )
        task = ImageClassification(net=lambda **_: net)
        task.data_metadata = self.data_metadata
        set_sizes(task, {**net_sizes, "in_channels": channels})
        task.configure_model()
        return task.eval()

    def training_step(self, batch: ImageBatch) -> dict[str, Any]:
        logits = self.logits(self.features(batch)).float()
        loss = F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=self.label_smoothing)
        return {"loss": (loss * batch.weight).sum(), "count": len(loss)}

    def validation_step(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return index, loss, class, predicted class and its probability for each image; used by `Report`."""
        real = batch.weight > 0
        logits = self.logits(self.features(batch)).float()[real]
        targets = batch.targets[real]
        self.metrics.update(logits, targets)
        probability, predicted = logits.softmax(-1).max(-1)
        loss = F.cross_entropy(logits, targets, reduction="none")
        index = batch.index[real]
        return {"index": index, "loss": loss, "target": targets, "predicted": predicted, "probability": probability}

    def on_validation_epoch_end(self) -> None:
        self.log_metrics("val", self.metrics)

    def test_step(self, batch: ImageBatch) -> dict[str, Tensor]:
        outputs = self.validation_step(batch)
        if self.flip_metrics is not None:
            both = [self.logits(self.features(b)) for b in (batch, batch._replace(images=batch.images.flip(-1)))]
            logs = torch.stack([logits.float().log_softmax(-1) for logits in both])  # [2, B, K]
            real = batch.weight > 0
            self.flip_metrics.update(logs.logsumexp(0)[real], batch.targets[real])  # logits of the mean probability
        return outputs

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test", self.metrics)
        if self.flip_metrics is not None:
            self.log_metrics("test_flips", self.flip_metrics)

    def predict_step(self, batch: ImageBatch) -> dict[str, Any]:
        """Return path, class, its probability, and the probabilities [n, K] of all classes for each image."""
        real = batch.weight > 0
        probabilities = self.logits(self.features(batch)).float()[real].softmax(-1)
        probability, predicted = probabilities.max(-1)
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009
        images = data.images("all")
        return {
            "path": [images.name(i) for i in batch.index[real].tolist()],
            "class": [self.data_metadata["classes"][i] for i in predicted.tolist()],
            "probability": probability,
            "probabilities": probabilities,
        }

    def prediction_metadata(self) -> dict[str, str]:
        """Metadata of a file of predictions: the classes, in the order of `probabilities`, as JSON."""
        return {"classes": json.dumps(self.data_metadata["classes"])}

    # The checkpoint holds classes and geometry, so that a loaded task can classify images without the data.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["images"] = self.data_metadata
        config = getattr(self.net, "config", None)
        if isinstance(config, dict):
            checkpoint["net_config"] = config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data_metadata = checkpoint.get("images") or checkpoint["pictures"]  # the key of earlier versions
        if self.data_metadata and self.data_metadata["classes"] != data_metadata["classes"]:
            raise ValueError(
                f"the classes of --data.path ({first_of(self.data_metadata['classes'], 8)}) are not those of the training"
                f" data ({first_of(data_metadata['classes'], 8)})"
            )
        self.data_metadata = data_metadata
        self.net_config = checkpoint.get("net_config")

    def forward(self, images: Tensor | ImageInput | Sequence[ImageInput]) -> Any:
        """Classify images.

        Args:
            images: an image (a PIL image, a path, or pixels [H, W] or [H, W, C] of uint8), or several; or a batch
                [B, C, S, S] of uint8, or of floats in 0 to 1.

        Returns:
            The classes with their probabilities, the most likely first; for several images, a list of these; for a
            batch, the logits [B, K].
        """
        if isinstance(images, Tensor):
            return self.logits(self.net_features(self.normalize(images)))
        if isinstance(images, ImageInput):
            return self._classify([images])[0]
        return self._classify(images)

    @torch.no_grad()
    def _classify(self, images: Sequence[ImageInput]) -> list[dict[str, float]]:
        if "classes" not in self.data_metadata:
            raise ValueError("this task has no classes: load it from a run with bigmodel.load")
        size, resize, classes = self.data_metadata["size"], self.data_metadata["resize"], self.data_metadata["classes"]
        pixels = [decode(image, channels=len(self.mean), size=size, resize=resize) for image in images]
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(self.device)  # [B, S, S, C] -> [B, C, S, S]
        answers = []
        for row in self.forward(batch).float().softmax(-1):
            probabilities, order = row.sort(descending=True)
            answers.append({classes[i]: p for i, p in zip(order.tolist(), probabilities.tolist(), strict=True)})
        return answers
