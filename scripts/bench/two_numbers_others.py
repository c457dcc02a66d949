"""The fixed cost of a step elsewhere, ms, one thread: `plain`, `lightning` or `trainer`.

All have the same points, fused AdamW and clipping to norm 1. *lightning* is its Trainer without logger, bar, checkpoints;
*trainer* is Hugging Face's at its defaults.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.common import Clock, arguments
from bench.two_numbers import BATCH_SIZE, Line, Points, TwoNumbers

AdamW = partial(torch.optim.AdamW, lr=1e-3, fused=True)


def _as_it_is(batch: Any) -> Any:
    return batch


def plain(clock: Clock) -> None:
    """A loop in PyTorch."""
    net = nn.Linear(1, 1)
    optimizer = AdamW(net.parameters())
    loader = DataLoader(Line(), BATCH_SIZE, shuffle=True, collate_fn=_as_it_is)
    for _, batch in zip(range(clock.steps), loader, strict=False):
        loss = (net(batch.x) - batch.y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


def lightning(clock: Clock) -> None:
    """Lightning with all of its own extras off."""
    from lightning.pytorch import Callback, Trainer

    class Timer(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            clock.tick()

    class Bare(TwoNumbers):
        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters())

        def training_step(self, batch: Points) -> Tensor:
            return (self.net(batch.x) - batch.y).square().mean()

    off = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=clock.steps, gradient_clip_val=1.0, accelerator="cpu", callbacks=[Timer()], **off)
    trainer.fit(Bare(), DataLoader(Line(), BATCH_SIZE, shuffle=True, collate_fn=_as_it_is))


def trainer(clock: Clock) -> None:
    """Hugging Face's Trainer."""
    from bench.trainer import train

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.net(x) - y).square().mean()}

    def collate(batch: Points) -> dict[str, Tensor]:
        return {"x": batch.x, "y": batch.y}

    train(
        Model(), Line(), clock, BATCH_SIZE, collate, save_strategy="no",
        optim="adamw_torch_fused", learning_rate=1e-3, remove_unused_columns=False,
    )  # fmt: skip


def main() -> None:
    way = {"plain": plain, "lightning": lightning, "trainer": trainer}[sys.argv.pop(1)]
    options = arguments(__doc__)
    clock = Clock(options.steps, options.warmup)
    warnings.simplefilter("ignore")
    way(clock)
    clock.report()


if __name__ == "__main__":
    main()
