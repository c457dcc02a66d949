"""Generated text samples during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from bigmodel.training.callbacks.checkpoint import Checkpoint


class Samples(Callback):
    """Continues each prompt after each validation; writes to `samples.md` next to the checkpoints' folder, and to W&B.

    For a task that *SupportsGenerate*: it has `generate(prompt, **options) -> str`.

    Args:
        prompts: each prompt gives one sample.
        options: passed to `generate`, for example `{max_new_tokens: 128, temperature: 0.8, seed: 0}`.
    """

    def __init__(self, prompts: list[str], options: dict[str, Any] | None = None) -> None:
        self.prompts, self.options = prompts, options or {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "generate"):
            raise ValueError(
                f"{type(pl_module).__name__} has no method `generate(prompt, ...)`, which the callback Samples needs: set"
                " --callbacks.samples null"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run_as_step = getattr(trainer.strategy, "run_as_step", None)  # if no process has the whole net, all take part
        if trainer.sanity_checking or trainer.state.fn != "fit" or not (trainer.is_global_zero or run_as_step):
            return
        task: Any = pl_module

        def generate() -> list[str]:
            return [prompt + task.generate(prompt, **self.options) for prompt in self.prompts]

        texts = run_as_step(generate) if run_as_step else generate()
        if not trainer.is_global_zero:
            return
        folders = (c.dirpath for c in trainer.callbacks if isinstance(c, Checkpoint | ModelCheckpoint) and c.dirpath)  # type: ignore[attr-defined]
        if (folder := next(folders, None)) is not None:
            with open(Path(folder).parent / "samples.md", "a", encoding="utf-8") as file:
                for text in texts:
                    file.write(f"## step {trainer.global_step:,}\n\n```\n{text}\n```\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                rows = [[trainer.global_step, *pair] for pair in zip(self.prompts, texts, strict=True)]
                logger.log_text("samples", columns=["step", "prompt", "text"], data=rows)
