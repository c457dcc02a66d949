"""Self-distillation: the teacher is an average of the student's weights.

Source: mean teacher, Tarvainen and Valpola 2017 (arXiv 1703.01780), section 2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from bigmodel.training.callbacks.averaging import tensors


class MeanTeacher(Callback):
    """Uses an average of the student's weights as the teacher: average = decay * average + (1 - decay) * weights after
    each optimizer step, starting from the student's first weights.

    Floating-point buffers (running statistics) are averaged too, others copied. Checkpoints hold the average in addition to
    the student.

    Args:
        decay: weight of the old average per optimizer step, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"--model.teacher.decay {decay} must lie in 0 <= decay < 1")
        self.decay = decay
        self.task: Any = None
        self._step = 0

    def copy_student(self, student: LightningModule, without: str) -> None:
        """Set the teacher, `task`, to a copy of the student.

        Args:
            student: with its net.
            without: the name of a submodule that the copy does not have.
        """
        self.task = copy.deepcopy(student)
        delattr(self.task, without)
        self.task.requires_grad_(False).eval()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        live, average = tensors(pl_module), tensors(self.task)
        averaged = [name for name, tensor in average.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([average[name] for name in averaged], [live[name] for name in averaged], 1 - self.decay)
        for name in average.keys() - set(averaged):
            average[name].copy_(live[name])

    def state_dict(self) -> dict[str, Any]:
        return {"average": tensors(self.task)} if self.task is not None else {}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.task is not None:  # None outside of training
            for name, tensor in tensors(self.task).items():
                tensor.copy_(state_dict["average"][name])
