"""Loading of a finished run: its trained task, its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor

from bigmodel.checkpoint import find_checkpoint, gather_full, load_weights, read
from bigmodel.checkpoint.renamed import current
from bigmodel.internals import attached_trainer
from bigmodel.run.config import read_yaml
from bigmodel.run.paths import find_run
from bigmodel.run.trust import check_imports, restricted_imports, trusting
from bigmodel.training.callbacks import EMA, SWA


def sizes(module: LightningModule) -> dict[str, int]:
    """Return the sizes that the data define and the net needs (vocabulary, classes, features), for `configure_model`.

    They come from the data module's attribute `sizes`; from the checkpoint if a task is loaded without data, or its
    data do not define them (unlabelled images to classify).

    Raises:
        ValueError: if neither is available.
    """
    found = getattr(getattr(attached_trainer(module), "datamodule", None), "sizes", None)
    if found is None:
        found = getattr(module, "_sizes", None)
    if found is None:
        raise ValueError(
            f"{type(module).__name__} needs sizes that the data define: give its data module an attribute `sizes`, such as"
            " {'num_features': 8}, set in `setup`"
        )
    return dict(found)


def set_sizes(module: LightningModule, known: Mapping[str, int]) -> None:
    """Set the result of `sizes` for a task without data."""
    module._sizes = dict(known)  # type: ignore[assignment]


def load(
    run: str | Path,
    checkpoint: str = "best",
    *,
    ema: bool = True,
    runs_dir: str | Path = "runs",
    trust: Sequence[str] = (),
) -> LightningModule:
    """Return the trained task of a run, in evaluation mode, ready to use; no data needed.

    Args:
        run: a run directory, `last`, the end of a run's name, or a checkpoint (a file or a folder).
        checkpoint: `best`, `last`, or the name of a file in the run's `checkpoints/`.
        ema: use the averaged weights if the run saved them.
        runs_dir: the folder in which runs are searched by name.
        trust: import paths of packages, modules, classes or functions that the run's configuration may name, besides
            those of bigmodel, torch.nn, torch.optim and of packages with a registered task.

    Raises:
        UntrustedImport: if its configuration names anything else.
        ValueError: if there is no such run, its checkpoint is damaged (the named one, or all), or its weights do not
            fit the model that its configuration describes.
    """
    content = _content(run, checkpoint, runs_dir)
    content.pop("optimizer_states", None)  # most of a sharded checkpoint, which would be assembled in memory
    content = gather_full(content)
    with trusting(trust):
        task = _built(_description(content), content, net=True)
    load_weights(task, content["state_dict"])
    average = find_average(content)
    if ema and average is not None:
        task.load_state_dict(average[1], strict=False)  # tied weights occur in it once
    return task.eval()


def describe(task: LightningModule | str | Path, *, runs_dir: str | Path = "runs") -> dict[str, Any]:
    """Return a plain description from which a task can be rebuilt, untrained, without the run.

    It consists of plain values, to be stored in another checkpoint.

    Args:
        task: from `load` or `build`; or a run, given as for `load`, whose best checkpoint is read except for its
            weights.
        runs_dir: the folder in which runs are searched by name.

    Returns:
        `model` (class_path and init_args), `sizes` (defined by the data), and `saved`: the task's own entries in its
        checkpoint, such as a tokenizer or the names of classes.

    Raises:
        ValueError: if there is no such run, or the task came from neither.
    """
    if not isinstance(task, LightningModule):
        return _description(_content(task, "best", runs_dir))
    description: Mapping[str, Any] | None = getattr(task, "_description", None)
    if description is None:
        raise ValueError(f"this {type(task).__name__} was not loaded from a run: take one from bigmodel.load")
    return dict(description)


def build(description: Mapping[str, Any], *, net: bool = True) -> LightningModule:
    """Return the task that `describe` described, in training mode, with new weights drawn from torch's random state.

    Args:
        description: from `describe`.
        net: create its net; false: only the task around it, with its tokenizer or its classes, at little cost.
    """
    return _built(description, dict(description["saved"]), net)


def _built(description: Mapping[str, Any], checkpoint: dict[str, Any], net: bool) -> LightningModule:
    task: LightningModule = _instantiate(LightningModule, description["model"])
    task._description = description  # type: ignore[assignment]  # for `describe`
    set_sizes(task, description["sizes"])
    task.on_load_checkpoint(checkpoint)
    if net:
        task.configure_model()
    return task


# Keys that are not the task's, for checkpoints that do not list them (`bigmodel`, `keys`): from early versions of 0.1.0.
_NOT_THE_TASKS = (
    "bigmodel", "callbacks", "epoch", "global_step", "hparams_name", "hparams_type", "hyper_parameters", "loops",
    "lr_schedulers", "optimizer_states", "pytorch-lightning_version", "state_dict",
)  # fmt: skip


def _content(run: str | Path, checkpoint: str, runs_dir: str | Path) -> dict[str, Any]:
    """Return a checkpoint's content, its tensors not read yet."""
    path = Path(run) if Path(run).suffix == ".ckpt" else find_checkpoint(find_run(run, runs_dir), checkpoint)
    content = read(path, whole=False)
    if "model" not in content.get("bigmodel", {}):
        raise ValueError(f"{path} does not contain a task's configuration: only checkpoints of `bigmodel fit` do")
    return content


def _description(content: dict[str, Any]) -> dict[str, Any]:
    others = {"bigmodel", *content["bigmodel"].get("keys", _NOT_THE_TASKS)}
    saved = gather_full({name: value for name, value in content.items() if name not in others})
    return {"model": content["bigmodel"]["model"], "sizes": content["bigmodel"]["sizes"], "saved": saved}


def find_average(checkpoint: dict[str, Any]) -> tuple[str, dict[str, Tensor]] | None:
    """Return the averaged weights in a checkpoint's content, with the name of their callback; None if there are none."""
    states = ((name, checkpoint["callbacks"].get(name, {})) for name in (EMA.__name__, SWA.__name__))
    return next(((name, state["average"]) for name, state in states if state.get("average")), None)


def load_data(run: str | Path, *, runs_dir: str | Path = "runs", trust: Sequence[str] = ()) -> LightningDataModule:
    """Return the data module of a run as it was configured, before prepare_data and setup.

    Args:
        run: a run directory, `last`, or the end of a run's name.
        runs_dir: the folder in which runs are searched by name.
        trust: as for `load`.

    Raises:
        UntrustedImport: if its configuration names code that is not allowed.
        ValueError: if there is no such run.
    """
    config = read_yaml(find_run(run, runs_dir) / "config.yaml")
    with trusting(trust):
        data: LightningDataModule = _instantiate(LightningDataModule, config["data"])
    return data


def _instantiate(kind: type, block: dict[str, Any]) -> Any:
    """Instantiate a block of class_path and init_args that a run or a checkpoint holds.

    Raises:
        UntrustedImport: if it names code that is not allowed.
    """
    from jsonargparse import ArgumentParser

    block = current(block)
    key = "data" if kind is LightningDataModule else "model"
    check_imports(block, key)
    parser = ArgumentParser(exit_on_error=False)
    with restricted_imports(block, key):
        parser.add_subclass_arguments(kind, "block", fail_untyped=False)
        return parser.instantiate(parser.parse_object({"block": block})).block
