"""The first samples of a split, and rows of a batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import Dataset

from bigmodel.data.sampling import Loader, eval_loader

_MAX_SAMPLES = 37


class _FirstSamples(Dataset[Any]):
    """First n samples of a data set."""

    def __init__(self, dataset: Any, n: int) -> None:
        self.dataset, self.n = dataset, n
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = dataset.__getitems__

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> Any:
        return self.dataset[number]


def first_samples(loader: Any, trainer: Trainer, samples_at_once: int | None) -> Loader:
    """Return a loader of the first samples of a split's loader; of several loaders, the first.

    Args:
        loader: from the data module.
        trainer: the trainer.
        samples_at_once: batch size over all processes; None: all samples.

    Raises:
        ValueError: if it is not from bigmodel.data.sampling.
    """
    one = loader[0] if isinstance(loader, list | tuple) else loader
    if not isinstance(one, Loader):
        raise ValueError(f"the loader is a {type(one).__name__}: create it with bigmodel.data.sampling.eval_loader")
    whole: Any = one.dataset.dataset  # type: ignore[attr-defined]
    n = min(len(whole), _MAX_SAMPLES)
    dataset = _FirstSamples(whole, n - 1 if n > 1 and n % 4 == 0 else n)  # so that a last batch has padding rows
    return eval_loader(dataset, batch_size=samples_at_once or len(dataset), trainer=trainer)


def has_split(data: Any, name: str) -> bool:
    """True if the data module has a non-empty loader of this name."""
    if not is_overridden(name, data):
        return False
    loader = getattr(data, name)()
    return loader is not None and not (isinstance(loader, list | tuple) and not loader)


def slice_rows(batch: Any, begin: int, end: int | None) -> Any:
    """Return some rows of a batch."""
    return type(batch)(*(part[begin:end] for part in batch))
