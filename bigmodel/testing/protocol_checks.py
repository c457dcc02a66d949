"""Checks of the optional protocols of a task; each function returns its result as text, or raises with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from bigmodel.data.stateless_rng import sample_keys
from bigmodel.protocols import (
    SupportsCorpusGeneration,
    SupportsGenerate,
    SupportsLogits,
    SupportsOnPolicySampling,
    SupportsRecommend,
)
from bigmodel.testing import short_runs
from bigmodel.testing.checks import CheckFailed, CheckSkipped
from bigmodel.testing.recorder import RunRecorder
from bigmodel.testing.samples import first_samples, slice_rows
from bigmodel.training.task import BaseTask

_ROUNDING = 1e-2  # of the sum of a distribution in half precision


def check_logits(run: RunRecorder) -> str:
    """Check features, logits and targets (SupportsLogits)."""
    task = run.task
    methods = ("features", "logits", "targets")
    there = [name for name in methods if callable(getattr(task, name, None))]
    if not [name for name in there if getattr(type(task), name, None) is not getattr(BaseTask, name, None)]:
        raise CheckSkipped("not implemented (features, logits, targets): the task cannot be distilled")
    if not isinstance(task, SupportsLogits):
        raise CheckFailed(
            f"the task has {', '.join(there)}, but not all of {', '.join(methods)}: bigmodel.protocols.SupportsLogits"
        )
    batch = run.batch
    run.task.eval()
    with torch.no_grad():
        features = task.features(batch)
        logits, targets = task.logits(features), task.targets(batch)
        half = len(features) // 2
        parts = torch.cat([task.logits(features[:half]), task.logits(features[half:])])
    if logits.shape[:-1] != targets.shape and logits.shape != targets.shape:
        raise CheckFailed(f"the shapes of logits {list(logits.shape)} and targets {list(targets.shape)} do not match")
    _check_declared(task, logits, targets)
    if not torch.allclose(parts, logits, rtol=1e-3, atol=1e-5):
        raise CheckFailed("logits of some rows of the features differ from the same rows of all logits: rows must not"
                          " depend on each other")  # fmt: skip
    return f"features {list(features.shape)}, logits {list(logits.shape)}, targets {list(targets.shape)}"


def _check_declared(task: Any, logits: Tensor, targets: Tensor) -> None:
    """Check that the task declares the problem type of its targets if these are no classes or distributions."""
    declared = getattr(task, "problem_type", None)
    if not targets.is_floating_point():
        return
    if targets.shape == logits.shape[:-1] or logits.shape[-1] == 1:
        required: tuple[str, ...] = ("regression",)
    elif ((targets.float().sum(-1) - 1).abs() < _ROUNDING).all():
        return
    else:
        required = ("multi_label_classification", "regression")
    if declared not in required:
        raise CheckFailed(
            f"targets are numbers {list(targets.shape)}, and problem_type is {declared!r}: give the task a property"
            f" problem_type that returns {' or '.join(required)}, since by default targets are compared as probabilities"
        )


def check_predict(run: RunRecorder) -> str:
    """Check that predict_step gives a row for each sample (SupportsPredict)."""
    task, data = run.task, run.data
    if not is_overridden("predict_step", task, LightningModule):
        raise CheckSkipped("not implemented (predict_step): `bigmodel predict` is not available")
    if not is_overridden("predict_dataloader", data, LightningDataModule):
        raise CheckFailed(f"{type(data).__name__} has no predict_dataloader, which predict_step needs")
    output = run.checkpoints[-1].with_suffix(".parquet")
    count = short_runs.predict(run.config, run.checkpoints[-1], output)
    table = pq.read_table(output)
    if len(table) != count:
        raise CheckFailed(
            f"predict_step returned {len(table)} rows for {count} samples: return one for each, none for weight 0"
        )
    return f"{count} rows of {', '.join(table.column_names)}"


def check_generate(run: RunRecorder) -> str:
    """Check that stream and generate agree (SupportsGenerate)."""
    task: Any = run.task
    if not isinstance(task, SupportsGenerate):
        raise CheckSkipped("not implemented (stream, generate)")
    options = {"max_new_tokens": 4, "seed": 0}
    run.task.eval()
    pieces, text = list(task.stream("a", **options)), task.generate("a", **options)
    if not all(isinstance(piece, str) for piece in pieces) or "".join(pieces) != text:
        raise CheckFailed(
            f"stream gave {pieces!r} and generate {text!r} with the same seed: they must give the same text"
        )
    return "stream and generate give the same text for a seed"


def check_corpus(run: RunRecorder) -> str:
    """Check that documents depend only on their keys and prompts (SupportsCorpusGeneration)."""
    task: Any = run.task
    data: Any = run.data
    if not isinstance(task, SupportsCorpusGeneration):
        raise CheckSkipped("not implemented (write_documents): no student can be trained on its documents")
    if not callable(getattr(data, "prompts", None)):
        raise CheckFailed(f"{type(data).__name__} has no method prompts(numbers, seed), which write_documents needs")
    numbers = range(3)
    prompts = list(data.prompts(numbers, 0))
    if [*data.prompts(numbers[:1], 0), *data.prompts(numbers[1:], 0)] != prompts:
        raise CheckFailed(
            "prompts differ for the same numbers and seed: each must be a function of its number and the seed"
        )
    accepted = inspect.signature(task.write_documents).parameters
    options = {"max_new_tokens": 4} if "max_new_tokens" in accepted else {}
    keys = sample_keys(0, 0, torch.tensor(numbers))
    run.task.eval()
    written = list(task.write_documents(prompts, keys, **options))
    if len(written) != len(prompts) or not all(_is_document(one) for one in written):
        raise CheckFailed(
            f"write_documents gave {written!r} for {len(prompts)} prompts: it must give (text, ended) for each"
        )
    if list(task.write_documents(prompts[1:], keys[1:], **options)) != written[1:]:
        raise CheckFailed(
            "write_documents wrote a different document for the same prompt and key in another batch: draw random numbers"
            " for a document only from its key (bigmodel.data.stateless_rng)"
        )
    return f"{len(written)} documents, the same for the same keys, in any batch"


def _is_document(one: Any) -> bool:
    return isinstance(one, tuple) and [type(part) for part in one] == [str, bool]


_NUM_NEW = 2  # generated tokens of each sequence


def check_on_policy(run: RunRecorder) -> str:
    """Check the regenerated ends of sequences (SupportsOnPolicySampling)."""
    task: Any = run.task
    if not isinstance(task, SupportsOnPolicySampling):
        raise CheckSkipped("not implemented (sample_on_policy)")
    if not isinstance(task, SupportsLogits):
        raise CheckFailed(
            "the task has sample_on_policy, but not all of features, logits, targets, which select the tokens of the loss"
        )
    batch: Any = run.batch
    keys = sample_keys(0, 0, batch.index)
    run.task.train()  # as in training
    modes, state = [module.training for module in run.task.modules()], torch.get_rng_state()
    new = _sample(task, batch, keys)
    if modes != [module.training for module in run.task.modules()] or not torch.equal(state, torch.get_rng_state()):
        raise CheckFailed(
            "sample_on_policy changes train/eval mode, or draws from torch's global random state (dropout does): sample in"
            " evaluation mode, restore the mode, and draw only from the keys"
        )
    if type(new) is not type(batch) or not all(
        torch.equal(getattr(new, name), getattr(batch, name)) for name in ("index", "weight")
    ):
        raise CheckFailed("sample_on_policy must return a batch of the same class, with the same index and weight")
    targets = task.targets(new)
    _check_new_targets(targets, task.targets(batch))
    half = len(keys) // 2
    parts = [_sample(task, slice_rows(batch, *rows), keys[slice(*rows)]) for rows in ((0, half), (half, None))]
    if not all(torch.equal(whole, torch.cat(halves)) for whole, *halves in zip(new, *parts, strict=True)):
        raise CheckFailed(
            "sample_on_policy gave different tokens for the same sample and key in another batch: draw random numbers for a"
            " sample only from its key (bigmodel.data.stateless_rng)"
        )
    try:
        task.sample_on_policy(batch, keys, max_new_tokens=targets.numel() + 2, temperature=1.0)
    except ValueError:
        return f"the last {_NUM_NEW} tokens of each sequence are generated, the same for the same keys, in any batch"
    raise CheckFailed(
        "sample_on_policy accepts a max_new_tokens above the sequence length: raise a ValueError that gives the maximum"
    )


def _check_new_targets(new: Tensor, old: Tensor) -> None:
    counted = (new != -100).reshape(len(new), -1).sum(1).tolist()
    if new.shape != old.shape or set(counted) != {_NUM_NEW}:
        raise CheckFailed(
            f"with {_NUM_NEW} generated tokens, {min(counted)} to {max(counted)} tokens of a sequence are targets: exactly"
            " the generated tokens must be targets, and all others -100"
        )


def _sample(task: Any, batch: Any, keys: Tensor) -> Any:
    with torch.no_grad():
        return task.sample_on_policy(batch, keys, max_new_tokens=_NUM_NEW, temperature=1.0)


def check_recommend(run: RunRecorder) -> str:
    """Check the lists for a user and for a history (SupportsRecommend)."""
    task: Any = run.task
    there = [name for name in ("recommend", "recommend_to") if callable(getattr(task, name, None))]
    if not there:
        raise CheckSkipped("not implemented (recommend, recommend_to)")
    if not isinstance(task, SupportsRecommend):
        raise CheckFailed(
            f"the task has {', '.join(there)}, but not all of recommend, recommend_to, item_ids:"
            " bigmodel.protocols.SupportsRecommend"
        )
    for name in ("user", "predict_dataloader"):
        if not callable(getattr(run.data, name, None)):
            raise CheckFailed(f"{type(run.data).__name__} has no method {name}, which `bigmodel recommend` needs")
    run.task.eval()
    batch = next(iter(first_samples(run.data.predict_dataloader(), run.trainer, 1)))
    items = _items(task.recommend_to(batch, 3), 3, "recommend_to")
    if items != _items(task.recommend_to(batch, 3), 3, "recommend_to") or not items:
        raise CheckFailed(
            f"recommend_to gave {items}, and a different or empty list when called again: it must not be random"
        )
    try:
        entries = _items(task.recommend(items, 3), 3, "recommend")
    except ValueError as error:
        return f"lists for users of the data; none for a history: {error}"
    if again := set(entries) & set(items):
        raise CheckFailed(
            f"recommend returned {sorted(again, key=str)}, which the history contains: exclude items of the history"
        )
    if _items(task.recommend(items, 1), 1, "recommend") != entries[:1]:
        raise CheckFailed("recommend with k 1 gives a different item than the first of a longer list")
    return "ordered lists for users of the data and for a history, without the items of the history"


def _items(entries: Sequence[Mapping[str, Any]], k: int, method: str) -> list[Any]:
    """Return the items of a valid list; raise for an invalid one."""
    wrong = [entry for entry in entries if not {"item", "title", "score"} <= entry.keys()]
    if wrong:
        raise CheckFailed(f"{method} gave an entry {dict(wrong[0])}: item, title and score are required")
    items, scores = [entry["item"] for entry in entries], [float(entry["score"]) for entry in entries]
    if len(items) > k or len(set(items)) < len(items) or scores != sorted(scores, reverse=True):
        raise CheckFailed(
            f"{method} with k {k} gave the items {items} with scores {scores}: at most k different items are accepted, the"
            " highest score first"
        )
    return items
