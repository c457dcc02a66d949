"""Stores of the teachers' logits for the training samples of a run: find, compute and read them.

V views of each sample (epochs of augmentation that repeat), K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from bigmodel.data.cache import say
from bigmodel.data.output_cache import OutputCache
from bigmodel.data.sampling import sequential_loader
from bigmodel.tasks.distillation.cache import NAME, REMEDY, TeacherCache, format_differences, samples_digest, unpack
from bigmodel.tasks.distillation.teachers import Published, Teacher
from bigmodel.training.precision import decide

_NUM_COMPARED = 64  # samples, to detect a changed augmentation


class CachedOutputs:
    """The cached outputs of all teachers of a run.

    Args:
        cache: its settings.
        temperature: T of cached probabilities.

    Attributes:
        keys: cache key of each teacher.
        stores: of each teacher; None if it has to be computed.
    """

    def __init__(self, cache: TeacherCache, temperature: float | None) -> None:
        self.cache, self.temperature = cache, temperature
        self.keys: list[dict[str, Any]] = []
        self.stores: list[OutputCache | None] = []
        self._trainer: Any = None
        self._loader: Any = None
        self._num_views = 1
        self._similar: list[str] = []  # descriptions of the most similar stores
        self._ahead: list[dict[str, Tensor]] = []  # outputs of the next batch

    def find(self, trainer: Trainer, teachers: list[Teacher | Published]) -> None:
        """Find the complete stores of the teachers.

        Raises:
            ValueError: if samples are new in each batch, or the folder that the user named is of different settings.
        """
        decide(trainer)  # the cache depends on the precision
        self._trainer = trainer
        data: Any = self._trainer.datamodule
        if getattr(data, "mix", None) is not None:
            raise ValueError(
                "--model.cache: mixed images (--data.mix) are new in each batch: set --data.mix or --model.cache null"
            )
        self._loader = data.train_dataloader()
        self._num_views = getattr(self._loader.order, "num_augmentation_epochs", None) or 1
        first, last = (_first_samples(trainer, self._loader, view) for view in (0, self._num_views - 1))
        self.keys, self.stores = [], []
        digest = samples_digest([first, last], getattr(data, "augmentation", ""))
        for teacher in teachers:
            key = self.cache.key(teacher.identity, data.fingerprint, digest, str(trainer.precision), self.temperature)
            store = OutputCache.stored(self.cache.path, key, self._loader.num_samples, self._num_views, NAME)
            on_all = trainer.strategy.reduce_boolean_decision(store is not None)
            self.stores.append(store if on_all else None)
            self.keys.append(key)
        similar = [self._find_similar(key) for key, store in zip(self.keys, self.stores, strict=True) if store is None]
        self._similar = [description for description in similar if description is not None]

    def _find_similar(self, key: dict[str, Any]) -> str | None:
        """Return path and differences of the most similar store, None if none is of this teacher or these data.

        Raises:
            ValueError: if the folder that the user named is of another teacher, other data, or different settings.
        """
        own = {store.path for store in self.stores if store is not None}
        found = OutputCache.others(self.cache.path, key, self._loader.num_samples, self._num_views)
        others = [other for other in found if other.path not in own]
        if not others:
            return None
        path, differences = others[0].path, format_differences(others[0].differences)
        if self.cache.folder is not None:
            raise ValueError(
                f"--model.cache.folder {self.cache.folder} holds teacher outputs of different settings, {path}:"
                f" {differences}. Set another folder, delete that one, or set --model.cache.folder null for the default,"
                " which holds all caches"
            )
        return None if {"teacher", "data"} <= others[0].differences.keys() else f"{path}: {differences}"

    def check_keys(self, saved: list[dict[str, Any]]) -> None:
        """Check that a resumed run reads the same stores as before.

        Args:
            saved: the keys in the checkpoint.

        Raises:
            ValueError: if they differ.
        """
        for before, now in zip(saved, self.keys, strict=True):
            differences = {name: (now[name], before[name]) for name in now if now[name] != before[name]}
            if differences:
                raise ValueError(
                    "--model.cache: the run to be resumed read teacher outputs of different settings:"
                    f" {format_differences(differences)}. Set the same"
                )

    def check_disk(self, tasks: list[Any]) -> None:
        """Check the disk space for the outputs of loaded teachers. Called before the run directory is created.

        Raises:
            ValueError: if the disk is too small, or samples are new in each epoch.
        """
        reserved = 0
        for number, (task, key) in enumerate(zip(tasks, self.keys, strict=True)):
            fields = self.cache.fields(self._check_views(task))
            store = OutputCache(self.cache.path, key, self._loader.num_samples, fields, self._num_views, NAME, REMEDY)
            store.check_space(beside=reserved)
            reserved += store.num_missing_bytes
            self.stores[number] = store
        if self._trainer.is_global_zero:
            for similar in self._similar:
                say(f"computing the teacher's logits; the most similar cache is {similar}")

    @torch.no_grad()
    def _check_views(self, task: Any) -> torch.Size:
        """Check that epochs repeat as often as the cache assumes; return the shape of a sample's logits. Runs on the
        CPU.
        """
        cpu = torch.device("cpu")
        first = _first_samples(self._trainer, self._loader, 0, cpu)
        if getattr(self._loader.order, "num_augmentation_epochs", None) is None:
            again = _first_samples(self._trainer, self._loader, 1, cpu)
            # Equal batches have equal outputs. Different ones may differ only in fields that the teacher does not read,
            # such as negatives.
            if getattr(self._trainer.datamodule, "augmentation", "") or (
                not _equal(first, again) and not torch.equal(self._logits(task, first), self._logits(task, again))
            ):
                raise ValueError(
                    "--model.cache: the samples differ in each epoch, so cached outputs would be read once: set"
                    " --data.num_augmentation_epochs to the number of epochs after which they repeat, or --model.cache null"
                )
        one = type(first)(*(values[:1] if isinstance(values, Tensor) else values for values in first))
        return self._logits(task, one).shape[1:]

    def _logits(self, task: Any, batch: Any) -> Tensor:
        with self._trainer.precision_plugin.forward_context():
            logits: Tensor = task.logits(task.features(batch))
        return logits

    def compute(self, tasks: list[Any]) -> None:
        """Compute what is missing in the stores.

        Raises:
            ValueError: if the disk has become too small.
        """
        trainer, loader = self._trainer, self._trainer.datamodule.train_dataloader()
        for store, task in zip(self.stores, tasks, strict=True):

            def outputs_of(batch: Any, task: Any = task) -> dict[str, Tensor]:
                logits = self._logits(task, trainer.strategy.batch_to_device(batch))
                return self.cache.pack(logits, self.temperature or 1.0)

            assert store is not None
            store.compute(
                trainer,
                lambda view: sequential_loader(loader, rows=loader.order.micro, trainer=trainer, epoch=view),
                outputs_of,
            )

    def read_ahead(self, batch: Any) -> None:
        """Read the outputs of a batch on the CPU: its indices on the device would need a synchronisation."""
        self._ahead = self._read(batch.index)

    def _read(self, index: Tensor) -> list[dict[str, Tensor]]:
        view = self._trainer.train_dataloader.schedule.at(self._trainer.global_step).epoch % self._num_views
        return [store.read(index, view) for store in self.stores if store is not None]

    def get(self, batch: Any) -> list[Tensor]:
        """Return the outputs of a batch, on its device, as tensors [n, ...]; see `unpack`."""
        # Lightning ignores the hook that reads ahead if the data module has one of its own.
        cached, self._ahead = self._ahead or self._read(batch.index.cpu()), []
        rows = []
        for fields in cached:
            rows += unpack({name: values.to(batch.index.device, non_blocking=True) for name, values in fields.items()})
        return rows


def _first_samples(trainer: Trainer, loader: Any, epoch: int, device: torch.device | None = None) -> Any:
    """Return the first samples of an epoch as a batch."""
    batch = next(iter(sequential_loader(loader, rows=_NUM_COMPARED, epoch=epoch)))
    return trainer.strategy.batch_to_device(batch, device)


def _equal(a: Any, b: Any) -> bool:
    """True if all tensors of two batches are equal."""
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
