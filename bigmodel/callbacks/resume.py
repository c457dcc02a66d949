"""Global batch size, and exact resume: a run stopped anywhere goes on as if it had not been stopped.

What Lightning's loops count are micro-batches on one process, so their state is that of one layout. Here it is written anew
from the one number that is the same on any layout, the optimizer steps taken; see `bigmodel.sampling` for the data.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data.distributed import DistributedSampler

from bigmodel.sampling import Loader, micro_batches, mix, replica


class Resume(Callback):
    """Makes `data.batch_size` global and resuming exact. Always on.

    Sets the trainer's accumulation from the data module's `batch_size` and `micro_batch_size`; takes an integer
    `val_check_interval` as optimizer steps, so that it means the same on every layout; seeds torch for each micro-batch,
    so that dropout needs no stored state; on loading, checks that data and batch are those of the checkpoint and
    rewrites the loops' progress for this layout.

    Args:
        seed: what dropout and other draws of the training step are seeded by, with step, micro-batch and process.
        allow_changed_data: go on although the data's fingerprint is not that of the checkpoint.
    """

    def __init__(self, seed: int = 0, allow_changed_data: bool = False) -> None:
        self.seed = seed
        self.allow_changed_data = allow_changed_data

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(self.seed)  # the net is made next: its weights depend on the seed alone
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
        # Made once for what they may refuse (too few samples, an empty split): the run has left nothing behind yet.
        _data(trainer).train_dataloader()
        if trainer.limit_val_batches and is_overridden("val_dataloader", _data(trainer)):
            _data(trainer).val_dataloader()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        if trainer.world_size > 1 and not isinstance(loader, Loader):
            sampler = getattr(loader, "sampler", None)
            if not isinstance(sampler, DistributedSampler):
                raise ValueError(
                    f"{trainer.world_size} processes would all read the same samples from this {type(loader).__name__}:"
                    " make it with bigmodel.sampling.train_loader, or set --trainer.use_distributed_sampler true"
                )
        every = trainer.val_check_batch
        accumulation = trainer.accumulate_grad_batches
        if isinstance(every, int) and every % accumulation:  # a fraction of an epoch: validate between optimizer steps
            trainer.val_check_batch = max(1, round(every / accumulation)) * accumulation

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        seed = mix(self.seed, trainer.global_step, batch_idx % trainer.accumulate_grad_batches, replica(trainer))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data, loader = _data(trainer), trainer.train_dataloader
        checkpoint["data"] = {
            "batch_size": getattr(data, "batch_size", None),
            "fingerprint": getattr(data, "fingerprint", None),
            "steps_per_epoch": loader.steps_per_epoch if isinstance(loader, Loader) else None,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or "data" not in checkpoint:
            return
        saved, data = checkpoint["data"], _data(trainer)
        batch_size, fingerprint = getattr(data, "batch_size", None), getattr(data, "fingerprint", None)
        if saved["fingerprint"] != fingerprint and not self.allow_changed_data:
            raise ValueError(
                f"the data are not those that the checkpoint was trained on (fingerprint {fingerprint}, in the checkpoint"
                f" {saved['fingerprint']}): a resumed run would see other samples. Restore the data and its settings, or"
                " set --allow_changed_data true to go on with these"
            )
        if saved["batch_size"] != batch_size:
            raise ValueError(
                f"--data.batch_size {batch_size} is not the checkpoint's {saved['batch_size']}: a resumed run would be"
                " another optimization. Keep it (micro_batch_size and the number of processes may change)"
            )
        if saved["steps_per_epoch"]:
            _place_loops(
                checkpoint["loops"]["fit_loop"],
                checkpoint["global_step"],
                saved["steps_per_epoch"],
                trainer.accumulate_grad_batches,
            )


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _place_loops(loops: dict[str, Any], step: int, steps_per_epoch: int, accumulation: int) -> None:
    """Write into the state of Lightning's fit loop that `step` optimizer steps were taken, in `accumulation` micro-batches
    each, and that the validation due there, if any, was run (`bigmodel.checkpoint.Checkpoint` sees to that)."""
    epoch, step_in_epoch = divmod(step, steps_per_epoch)
    if step_in_epoch == 0 and step > 0:  # still inside the epoch that it ends, for Lightning to end
        epoch, step_in_epoch = epoch - 1, steps_per_epoch
    batches = loops["epoch_loop.batch_progress"]
    batches["current"] = _progress(step_in_epoch * accumulation)
    batches["total"] = _progress(step * accumulation)
    batches["is_last_batch"] = step_in_epoch == steps_per_epoch
    for key in ("current", "total"):
        loops["epoch_progress"][key] = {
            "ready": epoch + 1,
            "started": epoch + 1,
            "processed": epoch,
            "completed": epoch,
        }


def _progress(done: int) -> dict[str, int]:
    return {"ready": done, "started": done, "processed": done, "completed": done - 1}
