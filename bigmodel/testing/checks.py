"""Conformance checks that need one run of a task: each function returns its result, or raises with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from bigmodel.cli import plugins
from bigmodel.cli.formatting import describe
from bigmodel.data.sampling import Loader
from bigmodel.data.stateless_rng import sample_keys
from bigmodel.protocols import (
    Batch,
    SupportsCorpusGeneration,
    SupportsGenerate,
    SupportsLogits,
    SupportsOnPolicySampling,
    SupportsRecommend,
    TaskData,
)
from bigmodel.run.config import Config
from bigmodel.testing import short_runs
from bigmodel.testing.short_runs import ShortRun


@dataclass(frozen=True)
class Finding:
    """One line of the result.

    Attributes:
        status: skip: this requirement could not be checked, or the task does not offer it.
        what: the requirement.
        text: the result; for a failure, including a remedy.
    """

    status: Literal["ok", "FAIL", "skip"]
    what: str
    text: str


class Failure(Exception):
    """Violated requirement; the message states a remedy."""


class Skip(Exception):
    """Requirement that cannot be checked; the message states why."""


class Blocked(Skip):
    """Requirement that cannot be checked, because another is violated."""


def arguments(config: Config) -> tuple[str, str] | None:
    """Return the first obstacle to a run: requirement and remedy; None if the classes have the required arguments."""
    for what, key, needed in (
        ("task", "model", ("optimizer", "schedule")),
        ("data", "data", ("batch_size", "micro_batch_size")),
    ):
        class_path = config[key]["class_path"]
        taken = inspect.signature(plugins.import_class(class_path)).parameters
        missing = [word for word in needed if word not in taken]
        if missing:
            protocol = "Task" if what == "task" else "TaskData"
            return what, (
                f"{class_path} takes no {' and no '.join(missing)}: add to its __init__; bigmodel.protocols.{protocol} says"
                " what they are. Mend this first: all else needs a run"
            )
    return None


def task(run: ShortRun) -> str:
    """Check that the net is created in configure_model, from its configuration, and once."""
    task, name = run.task, type(run.task).__name__
    if run.had_parameters:
        raise Failure(
            f"{name} has parameters as soon as it is made, so it cannot be sharded, and its sizes were typed by hand:"
            " make the net in configure_model, from bigmodel.sizes(self)"
        )
    net = getattr(task, "net", None)
    if not isinstance(net, nn.Module):
        raise Failure(f"{name}.net is {net!r} after configure_model: put the net there, for export and others to find")
    task.configure_model()
    if task.net is not net:
        raise Failure(
            "configure_model made a second net when it was called again: begin it with `if self.net is None:`"
        )
    count = sum(p.numel() for p in net.parameters())
    return f"{name} makes {type(net).__name__} ({count:,} parameters) in configure_model, once"


def data(run: ShortRun) -> str:
    """Check sizes and fingerprint."""
    data, name = run.data, type(run.data).__name__
    missing = [word for word in TaskData.__annotations__ if not hasattr(data, word)]
    if missing or not isinstance(data, TaskData):
        raise Failure(
            f"{name} has no {', no '.join(missing)} after setup; bigmodel.protocols.TaskData says what they are"
        )
    wrong = {key: size for key, size in data.sizes.items() if type(key) is not str or type(size) is not int}
    if wrong:
        raise Failure(f"{name}.sizes has {wrong}: names and plain int are needed, as they go into the checkpoint")
    if not isinstance(data.fingerprint, str) or not data.fingerprint:
        raise Failure(f"{name}.fingerprint is {data.fingerprint!r}: a text is needed, such as a hash of the samples")
    sizes = ", ".join(f"{key} {size:,}" for key, size in data.sizes.items())
    return f"{name} knows {sizes}; fingerprint {data.fingerprint[:8]}"


def batch(run: ShortRun) -> str:
    """Check for a NamedTuple of tensors, with index and weight."""
    batch: Any = run.batch
    if not (isinstance(batch, tuple) and hasattr(batch, "_fields")):
        raise Failure(f"a batch is a {type(batch).__name__}; a NamedTuple of tensors is needed, with index and weight")
    if not isinstance(batch, Batch) or not {"index", "weight"} <= set(batch._fields):
        raise Failure(f"{describe(batch)} lacks index [B] (which sample) or weight [B] (0 in rows that only fill up)")
    other = [name for name, part in zip(batch._fields, batch, strict=True) if not isinstance(part, Tensor)]
    if other:
        raise Failure(f"the batch's {', '.join(other)} is no tensor: a batch must go to a device as it is")
    index: Any = batch.index
    weight: Any = batch.weight
    rows = {name: part.shape[0] if part.ndim else None for name, part in zip(batch._fields, batch, strict=True)}
    if len(set(rows.values())) > 1 or index.ndim != 1 or weight.ndim != 1:
        raise Failure(f"{describe(batch)}: all need the same first dimension, index and weight no other")
    if index.is_floating_point() or not weight.is_floating_point() or not (weight > 0).all():
        raise Failure(f"{describe(batch)}: index must be integers, and weight floats above 0 while training")
    return describe(batch)


def loaders(run: ShortRun) -> str:
    """Check that the loaders are from bigmodel.data.sampling."""
    loaders = {name: getattr(run.data, name)() for name in ("train_dataloader", "val_dataloader")
               if short_runs.has_split(run.data, name)}  # fmt: skip
    for name, loader in loaders.items():
        one = loader[0] if isinstance(loader, list | tuple) else loader
        if not isinstance(one, Loader):
            maker = "train_loader" if name == "train_dataloader" else "eval_loader"
            raise Failure(
                f"{name} gives a {type(one).__name__}, which several processes would all read the same of, and which is"
                f" not resumed in mid-epoch: make it with bigmodel.data.sampling.{maker}"
            )
    steps = len(run.trainer.train_dataloader)  # without accumulation, each batch is a step
    missing = "" if "val_dataloader" in loaders else "; none for validation"
    return f"made by bigmodel.data.sampling, {steps:,} steps of {run.data.batch_size} an epoch{missing}"


def predicts(run: ShortRun) -> str:
    """Check the prediction in two parts (SupportsLogits)."""
    task = run.task
    methods = ("features", "logits", "targets")
    there = [name for name in methods if callable(getattr(task, name, None))]
    if not there:
        raise Skip("not offered (features, logits, targets): it cannot be distilled")
    if not isinstance(task, SupportsLogits):
        raise Failure(
            f"it has {', '.join(there)}, and not all of {', '.join(methods)}: bigmodel.protocols.SupportsLogits"
        )
    batch = run.batch
    run.task.eval()
    with torch.no_grad():
        features = task.features(batch)
        logits, targets = task.logits(features), task.targets(batch)
        half = len(features) // 2
        parts = torch.cat([task.logits(features[:half]), task.logits(features[half:])])
    if logits.shape[:-1] != targets.shape and logits.shape != targets.shape:
        raise Failure(f"logits {list(logits.shape)} do not go with targets {list(targets.shape)}")
    if not torch.allclose(parts, logits, rtol=1e-3, atol=1e-5):
        raise Failure("logits of parts of the features are not parts of the logits: no row may depend on others")
    return f"features {list(features.shape)}, logits {list(logits.shape)}, targets {list(targets.shape)}"


def tabulates(run: ShortRun) -> str:
    """Check for a table with a row for each sample."""
    task, data = run.task, run.data
    if not is_overridden("predict_step", task, LightningModule):
        raise Skip("not offered (predict_step): `bigmodel predict` has nothing to write")
    if not is_overridden("predict_dataloader", data, LightningDataModule):
        raise Failure(f"{type(data).__name__} has no predict_dataloader, which predict_step needs")
    output = run.checkpoints[-1].with_suffix(".parquet")
    count = short_runs.predict(run.config, run.checkpoints[-1], output)
    table = pq.read_table(output)
    if len(table) != count:
        raise Failure(f"predict_step wrote {len(table)} rows for {count} samples: one each, without those of weight 0")
    return f"{count} rows of {', '.join(table.column_names)}"


def generates(run: ShortRun) -> str:
    """Check pieces of text against the whole."""
    task: Any = run.task
    if not isinstance(task, SupportsGenerate):
        raise Skip("not offered (stream, generate)")
    options = {"max_new_tokens": 4, "seed": 0}
    run.task.eval()
    pieces, text = list(task.stream("a", **options)), task.generate("a", **options)
    if not all(isinstance(piece, str) for piece in pieces) or "".join(pieces) != text:
        raise Failure(
            f"stream gave {pieces!r} and generate {text!r} with the same seed: pieces of the same text are due"
        )
    return "stream and generate give the same text for a seed"


def writes(run: ShortRun) -> str:
    """Check that documents depend only on their keys and prompts."""
    task: Any = run.task
    data: Any = run.data
    if not isinstance(task, SupportsCorpusGeneration):
        raise Skip("not offered (write_documents): no student can be trained on what it writes")
    if not callable(getattr(data, "prompts", None)):
        raise Failure(f"{type(data).__name__} has no method prompts(numbers, seed): how would a document begin?")
    numbers = range(3)
    prompts = list(data.prompts(numbers, 0))
    if [*data.prompts(numbers[:1], 0), *data.prompts(numbers[1:], 0)] != prompts:
        raise Failure(
            "prompts gave others for the same numbers and seed: make each a function of its number and the seed"
        )
    known = inspect.signature(task.write_documents).parameters
    options = {"max_new_tokens": 4} if "max_new_tokens" in known else {}
    keys = sample_keys(0, 0, torch.tensor(numbers))
    run.task.eval()
    written = list(task.write_documents(prompts, keys, **options))
    if len(written) != len(prompts) or not all(_is_document(one) for one in written):
        raise Failure(f"write_documents gave {written!r} for {len(prompts)} prompts: (text, ended) is due for each")
    if list(task.write_documents(prompts[1:], keys[1:], **options)) != written[1:]:
        raise Failure(
            "write_documents wrote another document for the same beginning and key beside others: let nothing but its key"
            " (bigmodel.data.stateless_rng) decide what is drawn for a document"
        )
    return f"{len(written)} documents, the same for the same keys, in any batch"


def _is_document(one: Any) -> bool:
    return isinstance(one, tuple) and [type(part) for part in one] == [str, bool]


_WRITTEN = 2  # generated tokens of each sequence


def rewrites(run: ShortRun) -> str:
    """Check the regenerated ends of sequences, by their keys."""
    task: Any = run.task
    if not isinstance(task, SupportsOnPolicySampling):
        raise Skip("not offered (sample_on_policy)")
    if not isinstance(task, SupportsLogits):
        raise Failure(
            "it has sample_on_policy, and not all of features, logits, targets, which say what of a batch is learned"
        )
    batch: Any = run.batch
    keys = sample_keys(0, 0, batch.index)
    run.task.train()  # as in training
    modes, state = [module.training for module in run.task.modules()], torch.get_rng_state()
    new = _rewritten(task, batch, keys)
    if modes != [module.training for module in run.task.modules()] or not torch.equal(state, torch.get_rng_state()):
        raise Failure(
            "sample_on_policy leaves the net in another mode, or draws from torch's global state (dropout does): write in"
            " evaluation mode, restore what was, and draw by the keys"
        )
    if type(new) is not type(batch) or not all(
        torch.equal(getattr(new, n), getattr(batch, n)) for n in ("index", "weight")
    ):
        raise Failure("sample_on_policy must give a batch of the same class, with the same index and weight")
    targets = task.targets(new)
    counted = (targets != -100).reshape(len(targets), -1).sum(1).tolist()
    if targets.shape != task.targets(batch).shape or set(counted) != {_WRITTEN}:
        raise Failure(
            f"of {_WRITTEN} tokens that are written, {min(counted)} to {max(counted)} are targets in each sequence: exactly"
            " those are to be, and all others -100"
        )
    half = len(keys) // 2
    parts = [
        _rewritten(task, short_runs.sliced(batch, *rows), keys[slice(*rows)]) for rows in ((0, half), (half, None))
    ]
    if not all(torch.equal(whole, torch.cat(halves)) for whole, *halves in zip(new, *parts, strict=True)):
        raise Failure(
            "sample_on_policy wrote something else for the same sample and key beside others: let nothing but its key"
            " (bigmodel.data.stateless_rng) decide what is drawn for a sample"
        )
    try:
        task.sample_on_policy(batch, keys, max_new_tokens=targets.numel() + 2, temperature=1.0)
    except ValueError:
        return f"the last {_WRITTEN} tokens of each sequence are its own, the same for the same keys, in any batch"
    raise Failure(
        "sample_on_policy wrote more tokens than there are: a ValueError is due, which says how many there may be"
    )


def _rewritten(task: Any, batch: Any, keys: Tensor) -> Any:
    with torch.no_grad():
        return task.sample_on_policy(batch, keys, max_new_tokens=_WRITTEN, temperature=1.0)


def ranks(run: ShortRun) -> str:
    """Check the lists for a user and for a history."""
    task: Any = run.task
    there = [name for name in ("recommend", "recommend_to") if callable(getattr(task, name, None))]
    if not there:
        raise Skip("not offered (recommend, recommend_to)")
    if not isinstance(task, SupportsRecommend):
        raise Failure(
            f"it has {', '.join(there)}, and not all of recommend, recommend_to, item_ids:"
            " bigmodel.protocols.SupportsRecommend"
        )
    for name in ("user", "predict_dataloader"):
        if not callable(getattr(run.data, name, None)):
            raise Failure(f"{type(run.data).__name__} has no method {name}: whom would `bigmodel recommend` rank for?")
    run.task.eval()
    batch = next(iter(short_runs.first(run.data.predict_dataloader(), run.trainer, 1)))
    chosen = _ranked(task.recommend_to(batch, 3), 3, "recommend_to")
    if chosen != _ranked(task.recommend_to(batch, 3), 3, "recommend_to") or not chosen:
        raise Failure(f"recommend_to gave {chosen} first, and another list then, or none: nothing may be drawn")
    try:
        entries = _ranked(task.recommend(chosen, 3), 3, "recommend")
    except ValueError as error:
        return f"lists for users of the data; none for a history: {error}"
    if again := set(entries) & set(chosen):
        raise Failure(
            f"recommend put {sorted(again, key=str)} into the list of one who had them: leave the history out"
        )
    if _ranked(task.recommend(chosen, 1), 1, "recommend") != entries[:1]:
        raise Failure("recommend with k 1 gives another item than the first of a longer list")
    return "lists for users of the data and for a history, in order, with nothing that was chosen before"


def _ranked(entries: Sequence[Mapping[str, Any]], k: int, method: str) -> list[Any]:
    """Return the items of a valid list; raise for an invalid one."""
    wrong = [entry for entry in entries if not {"item", "title", "score"} <= entry.keys()]
    if wrong:
        raise Failure(f"{method} gave an entry {dict(wrong[0])}: item, title and score are needed")
    items, scores = [entry["item"] for entry in entries], [float(entry["score"]) for entry in entries]
    if len(items) > k or len(set(items)) < len(items) or scores != sorted(scores, reverse=True):
        raise Failure(
            f"{method} with k {k} gave the items {items} with scores {scores}: at most k, each once, the best first"
        )
    return items
