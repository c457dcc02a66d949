"""What a task and its data offer: the contract, as protocols that `isinstance` and type checkers understand.

A task needs `Task` and `TaskData`; each other protocol is needed only by who wants what it gives. `bigmodel check-task` runs
them all against a task. A change of what is asked here raises `PROTOCOL_VERSION`, and stands in the changelog.

B samples in a batch, D width of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

PROTOCOL_VERSION = 2


@runtime_checkable
class Batch(Protocol):
    """A `NamedTuple` of tensors, each with B rows, and these two among them.

    Attributes:
        index: [B] int64, which sample of its split each row is.
        weight: [B] float32, 1; 0 in rows that only fill up a last batch, which must not count in any metric.
    """

    @property
    def index(self) -> Any: ...
    @property
    def weight(self) -> Any: ...


@runtime_checkable
class TaskData(Protocol):
    """What a `LightningDataModule` has besides its loaders, which `bigmodel.data.sampling` makes.

    A property `augmentation`, if there is one, is a text that changes when training samples are changed otherwise at random,
    and empty when they are the same in each epoch: what is kept of a teacher is kept by it.

    Attributes:
        batch_size: samples per optimizer step, over all processes.
        micro_batch_size: samples one process takes at once; None: its whole share of the batch.
        sizes: the numbers that the data know and the net needs, such as `{"num_classes": 10}`, set in `setup`; handed to
            the net by name, and kept in the checkpoint, so that a run is loaded with no data present.
        fingerprint: of the samples and their order, set in `setup`; a resume on data of another is refused.
    """

    batch_size: int
    micro_batch_size: int | None
    sizes: Mapping[str, int]
    fingerprint: str


@runtime_checkable
class Task(Protocol):
    """What a `LightningModule` has: it takes `optimizer` and `schedule`, and `net` (or what else its net is made of, such as
    a backbone's name); `net` and `optimizer` as what makes them.

    `configure_model` makes the net from `bigmodel.sizes(self)`, once, however often it is called. `training_step` returns
    `{"loss": sum, "count": number}`: the sum of the loss over what was predicted, and how much that was. An entry `parts`,
    if there is one, holds further such sums by name, detached, whose means are logged as `train/<name>`. Metrics are
    torchmetrics, given the batch's weight. An attribute `counts` says what the count counts, "samples" if there is none.

    Attributes:
        net: the net; None until `configure_model`.
    """

    net: Any

    def configure_model(self) -> None: ...
    def configure_optimizers(self) -> Any: ...
    def training_step(self, batch: Any) -> Mapping[str, Any]: ...
    def validation_step(self, batch: Any) -> None: ...


@runtime_checkable
class SupportsLogits(Protocol):
    """Its prediction in two parts, for distillation, evaluation and export.

    A property `outcomes`, if there is one, says what the K logits are of, as plain values: the names of the classes, the
    tokenizer. A teacher of other outcomes is refused. A property `problem`, if there is one, says what a target is: `class`
    (one of K, or a distribution over them; so it is without the property), `labels` (each of K is there or not, 0 or 1), or
    `number`.
    """

    def features(self, batch: Any) -> Tensor:
        """[B, ..., D], what the head reads; the logits themselves, if the net does not part the two."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., K]; it may be called on chunks."""
        ...

    def targets(self, batch: Any) -> Tensor:
        """What the logits are compared with: class numbers [B, ...] (-100 where nothing is predicted), distributions or
        labels [B, ..., K], or numbers [B, ...]."""
        ...


@runtime_checkable
class SupportsPredict(Protocol):
    """Rows of a table for each batch: what `bigmodel predict` writes. The data module has a `predict_dataloader`.

    A method `prediction_metadata() -> dict[str, str]`, if there is one, says what stands in the file beside the table.
    """

    def predict_step(self, batch: Any) -> Mapping[str, Any]:
        """A column by name: a list of str, a tensor [n] or [n, K], or for anything else a pyarrow Array; a row for each of
        the batch, those of weight 0 left out. Every LightningModule has such a method; the contract is kept by one that has
        its own."""
        ...


@runtime_checkable
class SupportsGenerate(Protocol):
    """Goes on with a prompt: `bigmodel generate`, and `bigmodel.training.callbacks.Samples`."""

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """The continuation in pieces; of its options, `max_new_tokens` and `seed` are known everywhere."""
        ...

    def generate(self, prompt: str, **options: Any) -> str:
        """All pieces at once."""
        ...


@runtime_checkable
class SupportsCorpusGeneration(Protocol):
    """Writes whole documents: `bigmodel generate --documents`. The data module has a method `beginnings(numbers, seed)`: the
    first characters of a training document for each of these numbers, the same for the same number and seed."""

    def write_documents(self, beginnings: Sequence[str], keys: Tensor, **options: Any) -> Sequence[tuple[str, bool]]:
        """For each beginning, a whole document and whether it came to an end. Keyword arguments are its options; what is
        random about a document is a function of its key (`bigmodel.data.stateless_rng`), of [B] int64."""
        ...


@runtime_checkable
class SupportsOnPolicySampling(Protocol):
    """Writes training batches anew, as on-policy distillation needs them."""

    def rewrite(self, batch: Any, keys: Tensor, *, max_new_tokens: int, temperature: float) -> Any:
        """A batch like this one, of which the last `max_new_tokens` tokens of each sequence are the net's own, drawn at the
        temperature by the sample's key [B]; no others are targets. Draws nothing else, leaves the net as it was, and takes
        as many steps for every batch. A ValueError says where no tokens are left to begin with."""
        ...


@runtime_checkable
class SupportsRecommend(Protocol):
    """Puts items in order for somebody: `bigmodel recommend`. The data module has a method `user(user_id, item_ids)`, which
    gives one of its users as a batch of one row.

    Either method gives a list of at most k entries, the best first, with no item that was chosen before and none twice:
    mappings with `item` (its id), `title` (text or None) and `score` (a number; none is above the one before). A list of
    fewer is the beginning of one of more. A k that cannot be is a ValueError.

    Attributes:
        item_ids: ids of the items that a loaded task knows, in the order of its own numbers; None: those of its data.
    """

    @property
    def item_ids(self) -> Sequence[int] | Sequence[str] | None: ...

    def recommend(
        self, history: Sequence[int | str], k: int = 10, times: Sequence[int] | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """For somebody who chose these, by their ids, one after the other, at these times (seconds since 1970; None: not
        known). A task that knows only those it was trained on raises a ValueError that says so."""
        ...

    def recommend_to(self, batch: Any, k: int = 10) -> Sequence[Mapping[str, Any]]:
        """For the one user of a batch."""
        ...


@runtime_checkable
class SupportsExport(Protocol):
    """Says what `bigmodel export` writes; of other tasks it writes `net`."""

    def exported_net(self) -> Any:
        """The net as others shall have it, adapters merged. It is called on a loaded task, which is not used any more."""
        ...


@runtime_checkable
class SupportsFromPretrained(Protocol):
    """Makes a trained task of a model that somebody published: what `--model.teacher` of distillation takes besides runs."""

    def imported(self, path: str, flag: str) -> Any:
        """A trained task that *SupportsLogits* the outcomes of this one from the same batches, in evaluation mode; its net
        is the model at `path`, a folder or hf://owner/name (see `bigmodel.pretrained`). It is called on a task that knows
        its data (`bigmodel.sizes`), whose net need not be there. A ValueError, which names the flag and the path, says why
        the model cannot be that."""
        ...
