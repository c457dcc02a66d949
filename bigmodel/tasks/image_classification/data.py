"""Images as batches for the net: the data module and its dataset.

B images, C channels, S pixels of the side of the square that the net reads, K classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bigmodel.data.cache import available_cores, cache_folder, digest
from bigmodel.data.class_balance import ClassBalancedOversampling, class_weights
from bigmodel.data.module import BaseDataModule
from bigmodel.data.stateless_rng import sample_keys
from bigmodel.internals import shared_storage
from bigmodel.tasks.image_classification.augment import Transform, augment
from bigmodel.tasks.image_classification.batch import ImageBatch
from bigmodel.tasks.image_classification.geometry import RandomResizedCrop
from bigmodel.tasks.image_classification.images import Images
from bigmodel.tasks.image_classification.mixup import MixupCutMix
from bigmodel.tasks.image_classification.prepare import PreparedImages, prepare
from bigmodel.tasks.image_classification.sources import ImageColumns, find_source
from bigmodel.tasks.image_classification.splits import ImageSplit

_MAX_WORKERS = 16
# `ImageData.augmentation` is a part of the keys of caches: renamed transforms and arguments have their earlier names there.
_KEY_NAMES = {
    "RandomFlip": "Flip",
    "RandomGrayscale": "Grayscale",
    "TrivialAugmentWide": "TrivialAugment",
    "padding_mode": "mode",
    "num_magnitude_bins": "num_bins",
}


class ImageDataset(Dataset[ImageBatch]):
    """Dataset of the images of a split; returns batches.

    Args:
        images: the split.
        seed: with the epoch and the sample, determines the random draws of a sample.
        crop: crop that is applied as an image is read; None: the centre, as in evaluation.
        class_weights: [K] float32, the weight of an image by its class; None: 1.
        balanced: oversample each class to the size of the largest.
        read: read the pixels here; false: `images` of the batch is empty, for images that are held on the device.
    """

    def __init__(
        self,
        images: Images,
        seed: int,
        crop: RandomResizedCrop | None = None,
        class_weights: np.ndarray | None = None,
        balanced: bool = False,
        read: bool = True,
    ) -> None:
        self.images, self.seed, self.crop, self.class_weights, self.read = images, seed, crop, class_weights, read
        self.balanced = ClassBalancedOversampling(images.labels) if balanced else None

    def __len__(self) -> int:
        return len(self.images if self.balanced is None else self.balanced)

    def __getitem__(self, number: int) -> ImageBatch:
        """Return one sample of the first epoch, without the batch dimension."""
        return ImageBatch(*(field[0] for field in self.__getitems__([number])))

    def __getitems__(self, numbers: Sequence[int], epoch: int = 0) -> ImageBatch:
        """Return the samples of these numbers in an epoch, as one batch."""
        samples = np.asarray(numbers, np.int64)
        rows = samples if self.balanced is None else self.balanced.rows(samples, epoch)
        keys = sample_keys(self.seed, epoch, samples)
        pixels = torch.empty((len(rows), 0, 0, 0), dtype=torch.uint8)
        if self.read:
            boxes = self.crop.boxes(self.images.shapes[rows], keys) if self.crop is not None else None
            pixels = _empty(len(rows), *self.images.shape)  # [B, S, S, C]
            self.images.read(rows, boxes, out=pixels.numpy())
        labels = self.images.labels[rows]
        weight = np.ones(len(rows), np.float32) if self.class_weights is None else self.class_weights[labels]
        return ImageBatch(
            pixels.permute(0, 3, 1, 2),  # channels_last, without copying
            torch.from_numpy(labels),
            torch.from_numpy(rows),
            torch.from_numpy(weight),
            torch.from_numpy(keys),
        )


def _key_name(name: str) -> str:
    return _KEY_NAMES.get(name, name)


def _empty(*shape: int) -> Tensor:
    """Allocate memory for pixels; in a worker it is shared with the training process, which avoids a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = shared_storage(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


class ImageData(BaseDataModule):
    """Images from a folder, a table, arrays or a public dataset, checked and split once into a cache.

    Args:
        path: a folder (<class>/*.jpg or <split>/<class>/*.jpg), a CSV or Parquet file of images and labels, an .npz
            file, a folder with the published files of MNIST or CIFAR, a Hugging Face dataset (its folder, or
            hf://owner/name), or one of {mnist5k}, {digits}, {mnist}, {fashion_mnist}, {cifar10}, {cifar100}. For
            prediction: the same, without labels.
        size: side of the square image that the net reads [pixels].
        resize: length of the shorter edge after resizing, before the centre crop [pixels]; by default `size`.
        channels: 1 (grey) or 3; by default 1 if all training images are grey, in the evaluation of a run as in the run.
        split: shares of the images for validation and test, if the source has no splits.
        columns: names of the columns of a table that hold image, label and split.
        classes: names of the classes to use; by default all.
        shots: number of training images per class, drawn by `seed`; by default all images are used.
        crop: random crop of each training image as it is read: RandomResizedCrop; by default the centre.
        augment: augmentations of training batches on the device, in this order: RandomCrop, RandomFlip, RandomAffine,
            ColorJitter, RandAugment, RandomErasing, ... of bigmodel.tasks.image_classification.
        mix: mixes each training image with its neighbour: MixupCutMix.
        balance: for imbalanced classes; `weights`: weights the loss of an image by the inverse size of its class;
            `samples`: oversamples small classes.
        batch_size: images per optimizer step over all processes.
        micro_batch_size: images per forward pass of one process; by default its whole share of the batch.
        num_augmentation_epochs: number of epochs after which order and augmentation repeat; by default never. For
            cached teachers.
        on_corrupt: `error`: an image that cannot be read is an error; `skip`: it is skipped and reported.
        max_pixels: an image with more pixels is rejected before it is decoded.
        cache_decoded: store decoded images in the cache, memory-mapped; by default if they take at most 4 GB.
        cache_on_device: hold all decoded images on the training device.
        cache_dir: folder of the prepared images; by default $BIGMODEL_CACHE or ~/.cache/bigmodel.
        num_workers: processes that read and decode in advance; by default one per core (at most 16), none for decoded
            images.
        seed: with the epoch, determines the order of the images and their augmentation; also the draw of `shots`.

    Attributes:
        sizes: sizes that the net is built with: num_classes, in_channels, image_size. Set by `setup`, like
            `classes` (names, by class number) and all below, but not when predicting.
        fingerprint: hash of the images, their labels and how they are read.
        prepared: description of the prepared folder.
    """

    sizes: dict[str, int]
    fingerprint: str
    classes: list[str]
    prepared: PreparedImages

    def __init__(
        self,
        path: str,
        size: int = 224,
        resize: int | None = None,
        channels: Literal[1, 3] | None = None,
        split: ImageSplit | None = None,
        columns: ImageColumns | None = None,
        classes: list[str] | None = None,
        shots: int | None = None,
        crop: RandomResizedCrop | None = None,
        augment: list[Transform] | None = None,
        mix: MixupCutMix | None = None,
        balance: Literal["none", "weights", "samples"] = "none",
        batch_size: int = 64,
        micro_batch_size: int | None = None,
        num_augmentation_epochs: int | None = None,
        on_corrupt: Literal["error", "skip"] = "error",
        max_pixels: int = 2**27,
        cache_decoded: bool | None = None,
        cache_on_device: bool = False,
        cache_dir: str | None = None,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if cache_on_device and (crop is not None or cache_decoded is False):
            raise ValueError(
                "--data.cache_on_device true needs decoded images of one size: leave out --data.cache_decoded false and"
                " --data.crop (RandomResizedCrop in --data.augment crops on the device)"
            )
        self.path, self.size, self.channels = path, size, channels
        self.resize = size if resize is None else resize
        self.split, self.columns, self.crop = split or ImageSplit(), columns or ImageColumns(), crop
        self.chosen_classes, self.shots = classes, shots
        self.augment, self.mix, self.balance = augment or [], mix, balance
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.num_augmentation_epochs = num_augmentation_epochs
        self.on_corrupt, self.max_pixels, self.cache_decoded, self.cache_on_device = (
            on_corrupt,
            max_pixels,
            cache_decoded,
            cache_on_device,
        )
        self.cache_dir, self.num_workers, self.seed = cache_dir, num_workers, seed
        self._prepared: dict[bool, PreparedImages] = {}  # key: true for prediction
        self._device_images: dict[str, Tensor] = {}

    def prepare_data(self) -> None:
        """Find, check, split and decode the images, unless the cache already holds them for these settings.

        Raises:
            ValueError: if the input or a setting is invalid; the message names the file or row and the remedy.
        """
        self._prepare(predicting=self.is_running(TrainerFn.PREDICTING))

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared images."""
        self.prepared = self._prepare(predicting=stage == "predict")
        if stage == "predict":
            return
        self.classes = self.prepared.classes
        self.sizes = {
            "num_classes": len(self.classes),
            "in_channels": self.prepared.channels,
            "image_size": self.size,
        }
        self.fingerprint = digest([self.prepared.fingerprint, self.balance])

    @property
    def augmentation(self) -> str:
        """Settings that determine the random augmentation of training images, except the epoch; empty if there is none."""
        transforms = [*([self.crop] if self.crop is not None else []), *self.augment]
        if not transforms:
            return ""
        described = [
            [_key_name(type(transform).__name__), {_key_name(name): value for name, value in vars(transform).items()}]
            for transform in transforms
        ]
        return json.dumps([self.seed, described], default=lambda value: type(value).__name__)

    def _prepare(self, predicting: bool) -> PreparedImages:
        if predicting in self._prepared:
            return self._prepared[predicting]
        cache = cache_folder("image_classification", self.cache_dir)
        channels = self.channels
        if channels is None and (self.is_running(TrainerFn.VALIDATING) or self.is_running(TrainerFn.TESTING)):
            # those of the run that is evaluated
            channels = (getattr(getattr(self.trainer, "lightning_module", None), "_sizes", None) or {}).get(
                "in_channels"
            )
        source = find_source(self.path, columns=self.columns, cache=cache, labelled=not predicting)
        self._prepared[predicting] = prepare(
            source,
            size=self.size,
            resize=self.resize,
            channels=channels,
            whole=self.crop is not None,
            split=None if predicting else self.split,
            on_corrupt=self.on_corrupt,
            cache_decoded=True if self.cache_on_device else self.cache_decoded,
            cache=cache,
            max_pixels=self.max_pixels,
            classes=None if predicting else self.chosen_classes,
            shots=None if predicting else self.shots,
            seed=self.seed,
        )
        return self._prepared[predicting]

    def images(self, split: str) -> Images:
        """Return the images of a split.

        Raises:
            ValueError: if the split does not exist.
        """
        if split not in self.prepared.splits:
            raise ValueError(
                f"the data have no {split} split but {', '.join(self.prepared.splits)}: set --data.split.{split} to a share,"
                f" or add images for it ({split}/<class>/...)"
            )
        return self.prepared.images(split)

    def content_hashes(self, split: str) -> np.ndarray | None:
        return self.prepared.hashes.get(split)

    def class_weights(self) -> np.ndarray:
        """[K] float32, inverse to the sizes of the classes, with mean 1 over the training images."""
        return class_weights(np.asarray(self.prepared.splits["train"].class_counts))

    def make_dataset(self, split: str) -> ImageDataset:
        images, read = self.images(split), not self.cache_on_device
        if split != "train":
            return ImageDataset(images, self.seed, read=read)
        weights = self.class_weights() if self.balance == "weights" else None
        return ImageDataset(images, self.seed, self.crop, weights, self.balance == "samples", read=read)

    def has_validation(self) -> bool:
        return "val" in self.prepared.splits

    def train_options(self, dataset: ImageDataset) -> dict[str, Any]:
        return {"num_augmentation_epochs": self.num_augmentation_epochs}

    def loader_workers(self, dataset: Dataset[Any]) -> int:
        if self.num_workers is not None:
            return self.num_workers
        in_memory = self.cache_on_device or (isinstance(dataset, ImageDataset) and dataset.images.in_memory)
        return 0 if in_memory else min(available_cores(), _MAX_WORKERS)

    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        """Return a loader of all images at the path."""
        return self.evaluation_loader("all")

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Finish each batch on the device (a Lightning hook); see `finish`."""
        trainer: Any = self.trainer
        if trainer.training:
            return self.finish(batch, "train", training=True)
        if trainer.predicting:
            return self.finish(batch, "all")
        return self.finish(batch, "test" if trainer.testing else "val")

    def finish(self, batch: ImageBatch, split: str, training: bool = False) -> ImageBatch:
        """Return the batch as the net reads it.

        Images that are held on the device are taken from there; training batches are augmented and mixed. Runs on the
        device of the batch.

        Args:
            batch: from the loader of this split.
            split: name of the split.
            training: augment the batch.
        """
        if self.cache_on_device:
            batch = batch._replace(images=self._images_on_device(split, batch.index.device)[batch.index])
        if training and self.augment:
            batch = batch._replace(images=augment(batch.images, batch.key, self.augment))
        if training and self.mix is not None:
            images = augment(batch.images, batch.key, [])
            mixed = self.mix(images, batch.targets, batch.weight, batch.key, len(self.classes))
            batch = batch._replace(images=mixed[0], targets=mixed[1], weight=mixed[2])
        return batch

    def _images_on_device(self, split: str, device: torch.device) -> Tensor:
        """All images of a split [N, C, S, S] uint8, moved to the device once."""
        if split not in self._device_images:
            images = self.images(split)
            pixels = images.read(np.arange(len(images)))
            self._device_images[split] = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
        return self._device_images[split]
