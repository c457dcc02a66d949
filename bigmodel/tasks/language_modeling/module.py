"""Language modeling: predict the next token from the tokens before it.

Loss in nats per token; perplexity = exp(loss); bits per byte = loss / ln 2 / (UTF-8 bytes per token). Only bits per byte
are comparable across tokenizers.

B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from bigmodel.nn import GPT
from bigmodel.nn.accumulation import Accumulates, accumulable, accumulation_dtype
from bigmodel.nn.loss import IGNORE_INDEX, cross_entropy_sum
from bigmodel.run import set_sizes, sizes
from bigmodel.tasks.language_modeling.data import TextBatch
from bigmodel.tasks.language_modeling.text_generation import TextGenerator
from bigmodel.training import optimizers, schedules


class _Mean(Accumulates, MeanMetric):
    """A mean in the `accumulation_dtype` of its device."""


class LanguageModeling(TextGenerator):
    """Train and evaluate a net that maps tokens [B, T] to logits [B, T, V], and generate text with it.

    Args:
        net: factory of the net, called with `vocab_size` and `context_length` (tokens), taken from the data.
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; null: constant.
        loss_chunk_size: tokens whose logits are in memory at once, for a large vocabulary; null: all of a micro-batch.

    Logs `val/loss` (nats per token), `val/perplexity`, `val/bits_per_byte`, and the same for `test`.
    """

    count_unit = "tokens"

    def __init__(
        self,
        net: Callable[[int, int], nn.Module] = GPT,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
        loss_chunk_size: int | None = None,
    ) -> None:
        super().__init__(optimizer, schedule)
        self.make_net, self.loss_chunk_size = net, loss_chunk_size
        self.loss = _Mean().set_dtype(accumulation_dtype())

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.make_net(**sizes(self))  # type: ignore[call-arg]

    # SupportsLogits: for distillation, evaluation and export.

    def features(self, batch: TextBatch) -> Tensor:
        """Return the input of the output layer, [B, T, D]; the logits if the net has no separate output layer."""
        return self.net_features(batch.tokens)

    def targets(self, batch: TextBatch) -> Tensor:
        """Return the next tokens [B, T]; -100 where nothing is predicted, including padding rows."""
        return batch.targets.masked_fill(batch.weight[:, None] == 0, IGNORE_INDEX)

    @property
    def label_space(self) -> str | None:
        """The vocabulary: the tokenizer as JSON."""
        tokenizer = self._find_tokenizer()
        return tokenizer.to_json() if tokenizer is not None else None

    def from_pretrained(self, path: str, flag: str) -> LanguageModeling:
        """Load a transformers language model with this task's tokenizer; see
        `bigmodel.protocols.SupportsFromPretrained`.
        """
        from bigmodel.tasks.language_modeling.hugging_face import load_causal_lm

        known, tokenizer = sizes(self), self._require_tokenizer()
        net = load_causal_lm(path, flag, tokenizer, known["context_length"])
        task = LanguageModeling(net=lambda **_: net)
        task.tokenizer = tokenizer
        set_sizes(task, known)
        task.configure_model()
        return task.eval()

    def training_step(self, batch: TextBatch) -> dict[str, Tensor]:
        loss, count = cross_entropy_sum(self.logits, self.features(batch), batch.targets, self.loss_chunk_size)
        return {"loss": loss, "count": count}

    def validation_step(self, batch: TextBatch) -> None:
        loss, count = cross_entropy_sum(self.logits, self.features(batch), self.targets(batch), self.loss_chunk_size)
        self.loss.update(accumulable(loss) / count.clamp(min=1), count)

    def on_validation_epoch_end(self) -> None:
        self._log_loss("val")

    def test_step(self, batch: TextBatch) -> None:
        self.validation_step(batch)

    def on_test_epoch_end(self) -> None:
        self._log_loss("test")

    def _log_loss(self, split: str) -> None:
        loss = float(self.loss.compute())  # over all processes
        self.loss.reset()
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "bytes_per_token"):
            metrics["bits_per_byte"] = loss / math.log(2) / data.bytes_per_token(split)
        for name, value in metrics.items():
            self.log(f"{split}/{name}", torch.tensor(value, dtype=torch.float32), sync_dist=True)
