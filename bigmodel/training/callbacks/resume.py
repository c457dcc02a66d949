"""Global batch size, and exact resume: a run that is stopped anywhere continues as if uninterrupted.

Lightning's loops count micro-batches on one process, so their state depends on the number of processes. It is
recomputed here from the number of optimizer steps, which does not; see `bigmodel.data.sampling` for the data.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data.distributed import DistributedSampler

from bigmodel.data.sampling import Loader, data_parallel_rank, micro_batches
from bigmodel.data.schedule import DataPosition, DataProgress, DataSchedule, limit_steps
from bigmodel.data.stateless_rng import hash_seed
from bigmodel.internals import progress_of, stop_after_validation
from bigmodel.training.callbacks.checkpoint import is_validation_metric


class Resume(DataProgress):
    """Makes `data.batch_size` global and resuming exact. Always on.

    Sets the trainer's accumulation from the data module's `batch_size` and `micro_batch_size`; interprets an integer
    `val_check_interval` or `limit_train_batches` as optimizer steps, so that they are independent of the number of
    processes; seeds torch for each
    micro-batch, so that dropout needs no stored state; on loading, checks that data and batch size are those of the
    checkpoint, and rewrites the loops' progress for the current number of processes and micro-batches.

    Args:
        seed: combined with step, micro-batch and process to seed dropout and other draws of the training step.
        allow_changed_data: continue although the data's fingerprint differs from the checkpoint's. If the number of
            samples is the same, from the same position in their order; else with a new epoch, if one had begun.
        allow_changed_batch: continue although the batch size differs from the checkpoint's, from the first sample not
            yet seen. The count of optimizer steps, and with it the schedule, continues; a run bounded by epochs gets
            correspondingly more or fewer steps.

    Attributes:
        returns: rollbacks of the run so far, as in `run.json` (see `Anomalies`): the step `to` which it returned, and
            the `epoch` and the number of its `samples` after which it continued. Set before a checkpoint is loaded.
        num_returns: the number of rollbacks in the history of the current weights.
        new_returns: the number of those that the checkpoint does not include.
    """

    def __init__(self, seed: int = 0, allow_changed_data: bool = False, allow_changed_batch: bool = False) -> None:
        self.seed = seed
        self.allow_changed_data, self.allow_changed_batch = allow_changed_data, allow_changed_batch
        self.returns: list[dict[str, Any]] = []
        self.num_returns = self.new_returns = 0
        self._loader: Loader | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(self.seed)  # the net is created next: its weights depend on the seed alone
        batch_size = getattr(_data(trainer), "batch_size", None)
        if stage != "fit" or batch_size is None:
            return
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}: accumulation follows from"
                " --data.batch_size and --data.micro_batch_size; set these, and leave it at 1"
            )
        share = trainer.distributed_sampler_kwargs or {"num_replicas": 1}
        micro = getattr(_data(trainer), "micro_batch_size", None)
        _, trainer.accumulate_grad_batches = micro_batches(batch_size, micro, share["num_replicas"])
        if isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= trainer.accumulate_grad_batches
        if isinstance(trainer.limit_train_batches, int):
            trainer.limit_train_batches *= trainer.accumulate_grad_batches
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # Check directly after validation, not at the epoch's end: a checkpoint saved in between then includes it.
            if isinstance(callback, EarlyStopping):
                stop_after_validation(callback, is_validation_metric(callback.monitor))
        # Create the loaders once: errors (too few samples, an empty split) are raised before any file is written.
        self.origin = DataPosition()
        loader = _data(trainer).train_dataloader()
        self._loader = loader if isinstance(loader, Loader) else None
        if self._loader is not None:  # else Lightning's own count of micro-batches could end within a step
            whole = self._loader.num_samples // batch_size
            if (steps := limit_steps(whole, trainer.limit_train_batches, trainer.accumulate_grad_batches)) < whole:
                trainer.limit_train_batches = steps * trainer.accumulate_grad_batches
        if trainer.limit_val_batches and is_overridden("val_dataloader", _data(trainer)):
            _data(trainer).val_dataloader()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        if trainer.world_size > 1 and not isinstance(loader, Loader):
            sampler = getattr(loader, "sampler", None)
            if not isinstance(sampler, DistributedSampler):
                raise ValueError(
                    f"{trainer.world_size} processes would all read the same samples from this {type(loader).__name__}:"
                    " make it with bigmodel.data.sampling.train_loader, or set --trainer.use_distributed_sampler true"
                )
        every = trainer.val_check_batch
        accumulation = trainer.accumulate_grad_batches
        if isinstance(every, int) and every % accumulation:  # a fraction of an epoch: validate between optimizer steps
            trainer.val_check_batch = max(1, round(every / accumulation)) * accumulation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        seed = hash_seed(self.seed, trainer.global_step, micro_batch, data_parallel_rank(trainer))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data, loader = _data(trainer), trainer.train_dataloader
        checkpoint["data"] = {
            "batch_size": getattr(data, "batch_size", None),
            "fingerprint": getattr(data, "fingerprint", None),
            "num_samples": loader.num_samples if isinstance(loader, Loader) else None,
            "epoch_samples": loader.schedule.num_samples if isinstance(loader, Loader) and loader.schedule else None,
            "origin": asdict(self.origin),
            "returns": self.num_returns,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "data" not in checkpoint:
            return
        saved, step = checkpoint["data"], checkpoint["global_step"]
        changed = self._changed(saved, _data(trainer), step)
        if self._loader is None or not (saved.get("num_samples") or saved.get("steps_per_epoch")):
            return  # not a bigmodel loader
        now = self._loader.schedule
        assert now is not None
        num_samples, before = _saved_schedule(saved, self._loader)
        here = before.at(step)
        from_here = [entry for entry in self.returns if entry["to"] == step]
        self.new_returns = len(from_here)
        self.num_returns = saved.get("returns", 0) + self.new_returns
        if from_here:
            here = replace(here, epoch=from_here[-1]["epoch"], samples=from_here[-1]["samples"])
        if num_samples != self._loader.num_samples and here.samples:  # another order: seen samples are unknown
            here = replace(here, epoch=here.epoch + 1, samples=0)
        limited = before.num_samples != now.num_samples and num_samples == self._loader.num_samples
        self.origin = here if changed or from_here or limited else before.origin
        now = replace(now, origin=self.origin)
        if changed and trainer.is_global_zero:
            print(f"{changed}, on purpose. {_describe_position(now, step)}", flush=True)
        _set_progress(checkpoint["loops"]["fit_loop"], now, step, trainer.accumulate_grad_batches)

    def _changed(self, saved: dict[str, Any], data: Any, step: int) -> str:
        """Describe what differs from the checkpoint; empty if nothing does.

        Raises:
            ValueError: if the change is not allowed.
        """
        batch_size, fingerprint = getattr(data, "batch_size", None), getattr(data, "fingerprint", None)
        num_samples = self._loader.num_samples if self._loader is not None else None
        was = saved.get("num_samples") or num_samples  # not written by earlier versions
        changes = []
        if saved["fingerprint"] != fingerprint or was != num_samples:
            changes.append(
                f"the data are not those that the checkpoint was trained on ({num_samples} samples, fingerprint"
                f" {fingerprint}; in the checkpoint {was}, {saved['fingerprint']})"
            )
            if not self.allow_changed_data:
                raise ValueError(
                    f"{changes[0]}: a resumed run would see other samples. Restore the data and its settings, or set"
                    f" --allow_changed_data true to go on with these, {_how_data_go_on(was == num_samples)}"
                )
        if saved["batch_size"] != batch_size:
            changes.append(f"--data.batch_size {batch_size} is not the checkpoint's {saved['batch_size']}")
            if not self.allow_changed_batch:
                raise ValueError(
                    f"{changes[-1]}: a resumed run would be another optimization. Keep it (micro_batch_size and the number"
                    " of processes may change), or set --allow_changed_batch true to go on with this one: from the first"
                    f" sample not yet seen, with optimizer step {step + 1:,} of the same schedule"
                )
        return "; ".join(changes)


def _how_data_go_on(as_many: bool) -> str:
    return "from the same place in their order" if as_many else "from the start of an epoch: their order is another"


def _saved_schedule(saved: dict[str, Any], loader: Loader) -> tuple[int, DataSchedule]:
    """Return the number of samples and the data schedule that a checkpoint was written with."""
    batch_size = saved["batch_size"]
    num_samples = saved.get("num_samples")
    if num_samples is None:  # written by an earlier version, which counted whole steps only
        as_now = saved["steps_per_epoch"] == loader.num_samples // batch_size
        num_samples = loader.num_samples if as_now else saved["steps_per_epoch"] * batch_size
    schedule = DataSchedule(
        saved.get("epoch_samples") or num_samples, batch_size, DataPosition(**saved.get("origin", {}))
    )
    return num_samples, schedule


def _describe_position(schedule: DataSchedule, step: int) -> str:
    """Describe where a run continues after a change of batch size or data."""
    here, left = schedule.origin, schedule.steps_left(schedule.origin)
    place = f"{here.seen:,} samples were seen in {step:,} optimizer steps; epoch {here.epoch} goes on after {here.samples:,}"
    dropped = schedule.num_samples - here.samples - left * schedule.batch_size
    rest = f" of its {schedule.num_samples:,} samples, with {left:,} steps of {schedule.batch_size:,}"
    if left == 0:
        return (
            f"{place}{rest}: the {dropped:,} samples left make no step and are left out, and so is its last validation"
        )
    return f"{place}{rest}" + (f" (the last {dropped:,} make no step)" if dropped else "")


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _set_progress(loops: dict[str, Any], schedule: DataSchedule, step: int, accumulation: int) -> None:
    """Write the progress after `step` optimizer steps into the state of Lightning's fit loop.

    Each step has `accumulation` micro-batches. A validation due at this step counts as done
    (`bigmodel.training.callbacks.Checkpoint` ensures that).
    """
    here, steps_per_epoch = schedule.at(step), schedule.steps_per_epoch
    # Counted from the epoch's end, where Lightning must end it: the batch size may have changed within the epoch.
    epoch, step_in_epoch = here.epoch, steps_per_epoch - schedule.steps_left(here)
    if step_in_epoch == 0 and step > 0:  # still in the epoch that this step completes; Lightning ends it
        epoch, step_in_epoch = epoch - 1, steps_per_epoch
    batches, epochs = progress_of(loops, "epoch_loop.batch_progress"), progress_of(loops, "epoch_progress")
    batches["current"] = _progress(step_in_epoch * accumulation)
    batches["total"] = _progress(step * accumulation)
    batches["is_last_batch"] = step_in_epoch == steps_per_epoch
    for key in ("current", "total"):
        epochs[key] = {
            "ready": epoch + 1,
            "started": epoch + 1,
            "processed": epoch,
            "completed": epoch,
        }


def _progress(done: int) -> dict[str, int]:
    return {"ready": done, "started": done, "processed": done, "completed": done - 1}
