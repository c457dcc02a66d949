"""Contract of a task and its data, as protocols for `isinstance` and type checkers.

A task needs `Task` and `TaskData`; each other protocol is required only for the feature that uses it. `bigmodel
check-task` checks a task against all of them. A change of these requirements increases `PROTOCOL_VERSION`, and is
listed in the changelog.

B samples in a batch, D width of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

PROTOCOL_VERSION = 3


@runtime_checkable
class Batch(Protocol):
    """`NamedTuple` of tensors, each with B rows, including these two.

    Attributes:
        index: [B] int64, the number of each row's sample in its split.
        weight: [B] float32, 1; 0 in padding rows of a last batch, which must not count in any metric.
    """

    @property
    def index(self) -> Any: ...
    @property
    def weight(self) -> Any: ...


@runtime_checkable
class TaskData(Protocol):
    """Required attributes of a `LightningDataModule`, besides its loaders, which `bigmodel.data.sampling` creates.

    An optional property `augmentation` is a string that changes when the random augmentation of training samples
    changes, and is empty if they are the same in each epoch: cached outputs of a teacher are keyed by it.

    Attributes:
        batch_size: samples per optimizer step, over all processes.
        micro_batch_size: samples per process and forward pass; None: the process's whole share of the batch.
        sizes: the numbers that the data define and the net needs, such as `{"num_classes": 10}`, set in `setup`; passed
            to the net by name, and saved in the checkpoint, so that a run can be loaded without data.
        fingerprint: identifies the samples and their order, set in `setup`; a resume on data with another one is
            refused.
    """

    batch_size: int
    micro_batch_size: int | None
    sizes: Mapping[str, int]
    fingerprint: str


@runtime_checkable
class Task(Protocol):
    """Required interface of a `LightningModule`, whose arguments include `net`, `optimizer` and `schedule`.

    `net` and `optimizer` are factories; other arguments that define the net, such as a backbone's name, may replace
    `net`. `configure_model` creates the net from `bigmodel.sizes(self)`, once, however often it is called.
    `training_step` returns `{"loss": sum, "count": number}`: the sum of the loss over the predicted elements, and their
    number. An optional entry `parts` holds further such sums by name, detached, whose means are logged as
    `train/<name>`. Metrics are torchmetrics, called with the batch's weight. An optional attribute `count_unit` names the
    unit of the count, by default "samples". A class attribute `loss_is_per_sample = False` declares a loss in which the
    samples of a batch depend on each other; such a task may return its mean instead of sum and count.

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
    """Prediction in two parts, for distillation, evaluation and export.

    An optional property `label_space` identifies the meaning of the K logits, as plain values: the names of the classes,
    the tokenizer. A teacher with another label space is refused. An optional property `problem_type` is the type of the
    targets, as in transformers: `single_label_classification` (one of K, or a distribution over them; the default),
    `multi_label_classification` (each of K is 0 or 1), or `regression`. A task whose targets are numbers must have it.
    """

    def features(self, batch: Any) -> Tensor:
        """Return [B, ..., D], the input of the head; the logits themselves, if the net has no separate head."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]; may be called on chunks."""
        ...

    def targets(self, batch: Any) -> Tensor:
        """Return the targets of the logits.

        Class numbers [B, ...] (-100 for positions without a target), distributions or labels [B, ..., K], or numbers
        [B, ...].
        """
        ...


@runtime_checkable
class SupportsPredict(Protocol):
    """Rows of a table for each batch, as written by `bigmodel predict`. The data module has a `predict_dataloader`.

    An optional method `prediction_metadata() -> dict[str, str]` returns the metadata of the file.
    """

    def predict_step(self, batch: Any) -> Mapping[str, Any]:
        """Return columns by name: a list of str, a tensor [n] or [n, K], or for any other type a pyarrow Array.

        One row per sample of the batch, without those of weight 0. Every LightningModule has such a method; the
        protocol requires an overridden one.
        """
        ...


@runtime_checkable
class SupportsGenerate(Protocol):
    """Continuation of a prompt: for `bigmodel generate`, and `bigmodel.training.callbacks.Samples`."""

    def stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """Yield the continuation in pieces; every implementation supports the options `max_new_tokens` and `seed`."""
        ...

    def generate(self, prompt: str, **options: Any) -> str:
        """Return the whole continuation."""
        ...


@runtime_checkable
class SupportsCorpusGeneration(Protocol):
    """Generation of whole documents: for `bigmodel generate --documents`.

    The data module has a method `prompts(numbers, seed)`: the first characters of a training document for each of
    these numbers, the same for the same number and seed.
    """

    def write_documents(self, prompts: Sequence[str], keys: Tensor, **options: Any) -> Sequence[tuple[str, bool]]:
        """Return, for each beginning, a whole document and whether it was completed.

        Keyword arguments are options; all randomness in a document is a function of its key
        (`bigmodel.data.stateless_rng`), from keys [B] int64.
        """
        ...


@runtime_checkable
class SupportsOnPolicySampling(Protocol):
    """Regeneration of training batches, for on-policy distillation."""

    def sample_on_policy(self, batch: Any, keys: Tensor, *, max_new_tokens: int, temperature: float) -> Any:
        """Return a batch like this one, with the last `max_new_tokens` tokens of each sequence generated by the net.

        They are drawn at the temperature by the sample's key [B], and are the only targets. Uses no other randomness,
        leaves the net unchanged, and takes the same number of steps for every batch. Raises a ValueError if no tokens
        are left as a prompt.
        """
        ...


@runtime_checkable
class SupportsRecommend(Protocol):
    """Ranking of items for a user: for `bigmodel recommend`.

    The data module has a method `user(user_id, item_ids)`, which returns one of its users as a batch of one row. Both
    methods return a list of at most k entries, the best first, without items chosen before and without duplicates:
    mappings with `item` (its id), `title` (text or None) and `score` (a number, in non-increasing order). A shorter
    list is a prefix of a longer one. An invalid k is a ValueError.

    Attributes:
        item_ids: ids of the items of a loaded task, in the order of its item numbers; None: those of its data.
    """

    @property
    def item_ids(self) -> Sequence[int] | Sequence[str] | None: ...

    def recommend(
        self, history: Sequence[int | str], k: int = 10, times: Sequence[int] | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """Recommend to a user who chose the items of `history` (ids), in this order.

        `times` are in seconds since 1970; None: unknown. A task that supports only the users it was trained on raises a
        ValueError.
        """
        ...

    def recommend_to(self, batch: Any, k: int = 10) -> Sequence[Mapping[str, Any]]:
        """Recommend to the one user of a batch."""
        ...


@runtime_checkable
class SupportsExport(Protocol):
    """Customizes `bigmodel export`; for other tasks it writes `net`."""

    def merged_model(self) -> Any:
        """Return the net to publish, adapters merged. It is called on a loaded task, which is not used afterwards."""
        ...


@runtime_checkable
class SupportsFromPretrained(Protocol):
    """Creation of a trained task from a published model: `--model.teacher` of distillation accepts these besides runs."""

    def from_pretrained(self, path: str, flag: str) -> Any:
        """Return a trained task, in evaluation mode, whose net is the model at `path`.

        The path is a folder or hf://owner/name (see `bigmodel.pretrained`). The result *SupportsLogits* with the
        label space of this task from the same batches. It is called on a task whose data are available (`bigmodel.sizes`);
        its net need not exist. A ValueError, which names the flag and the path, gives the reason if the model cannot be
        used.
        """
        ...
