"""Language modeling: predict the next token from the tokens before it.

Loss in nats per token; perplexity = exp(loss); bits per byte = loss / ln 2 / (UTF-8 bytes per token), the only one of the
three that compares across tokenizers.

B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from bigmodel.internals import attached_trainer
from bigmodel.nn import GPT
from bigmodel.nn.accumulation import Accumulates, accumulable, accumulation_dtype
from bigmodel.nn.loss import IGNORE_INDEX, cross_entropy_sum
from bigmodel.run import set_sizes, sizes
from bigmodel.tasks.language_modeling.data import TextBatch
from bigmodel.tasks.language_modeling.generation import generate
from bigmodel.tasks.language_modeling.tokenizer import StreamDecoder, Tokenizer
from bigmodel.training import optimizers, schedules
from bigmodel.training.callbacks import GradientScaling
from bigmodel.training.callbacks.gradient_scaling import get_callback


class _Mean(Accumulates, MeanMetric):
    """A mean in the `accumulation_dtype` of its device."""


class LanguageModeling(LightningModule):
    """Trains and evaluates a net that maps tokens [B, T] to logits [B, T, V], and generates text with it.

    Args:
        net: factory of the net, called with `vocab_size` and `context_length` (tokens), taken from the data.
        optimizer: factory of the optimizer, called with parameter groups.
        schedule: learning rate schedule over the run's optimizer steps; null: constant.
        loss_chunk_size: tokens whose logits are in memory at once, for a large vocabulary; null: all of a micro-batch.

    Logs `val/loss` (nats per token), `val/perplexity`, `val/bits_per_byte`, and the same for `test`.
    """

    count_unit = "tokens"  # unit of the count that training_step returns

    def __init__(
        self,
        net: Callable[[int, int], nn.Module] = GPT,
        optimizer: optimizers.OptimizerFactory = torch.optim.AdamW,
        schedule: schedules.Schedule | None = None,
        loss_chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.make_net, self.optimizer, self.schedule = net, optimizer, schedule
        self.loss_chunk_size = loss_chunk_size
        self.net: Any = None
        self.tokenizer: Tokenizer | None = None
        self.loss = _Mean().set_dtype(accumulation_dtype())

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.make_net(**sizes(self))  # type: ignore[call-arg]

    def configure_callbacks(self) -> list[Callback]:
        # The loss is a sum: a plain Trainer also needs the callback that divides it by the count.
        return [] if get_callback(self.trainer, GradientScaling) else [GradientScaling()]

    def configure_optimizers(self) -> Any:
        return optimizers.configure(self, self.optimizer, self.schedule)

    # The SupportsLogits protocol, used by distillation, evaluation and export.

    def features(self, batch: TextBatch) -> Tensor:
        """Return what the output layer reads, [B, T, D]; the logits if the net has no separate output layer."""
        read = getattr(self.net, "features", self.net)
        return read(batch.tokens)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., V]; may be called on chunks."""
        return self.net.logits(features) if hasattr(self.net, "logits") else features

    def targets(self, batch: TextBatch) -> Tensor:
        """Return the next tokens [B, T]; -100 where nothing is predicted, including padding rows."""
        return batch.targets.masked_fill(batch.weight[:, None] == 0, IGNORE_INDEX)

    @property
    def label_space(self) -> str | None:
        """The vocabulary: the tokenizer as JSON."""
        tokenizer = self._tokenizer()
        return tokenizer.to_json() if tokenizer is not None else None

    def from_pretrained(self, path: str, flag: str) -> LanguageModeling:
        """Load a transformers language model with this task's tokenizer; see
        `bigmodel.protocols.SupportsFromPretrained`.
        """
        from bigmodel.tasks.language_modeling.hugging_face import as_published

        known, tokenizer = sizes(self), self._known_tokenizer()
        net = as_published(path, flag, tokenizer, known["context_length"])
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

    # The checkpoint holds the tokenizer, so that a loaded task can generate without the data.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tokenizer = self._tokenizer()
        if tokenizer is not None:
            checkpoint["tokenizer"] = tokenizer.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "tokenizer" in checkpoint:
            self.tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])

    def _tokenizer(self) -> Tokenizer | None:
        data = getattr(attached_trainer(self), "datamodule", None)
        return getattr(data, "tokenizer", self.tokenizer)

    def _known_tokenizer(self) -> Tokenizer:
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise ValueError("this task has no tokenizer: load it from a run with bigmodel.load")
        return tokenizer

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Collection[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """Continue a text, and yield it piece by piece.

        Args:
            prompt: the text to continue; empty: start a new document.
            max_new_tokens: maximum number of new tokens.
            temperature: divides the logits; 0: greedy decoding.
            top_k: sample from the k most likely tokens only.
            top_p: sample from the most likely tokens that together have this probability.
            stop: tokens, given as text, that end the generation, besides the end of the document.
            seed: the same seed gives the same text.

        Returns:
            Pieces of text, without the prompt.

        Raises:
            ValueError: for arguments out of range, or a task that has no tokenizer.
        """
        tokenizer = self._known_tokenizer()
        start = tokenizer.encode(prompt) or [tokenizer.end_of_text]
        stops = {tokenizer.end_of_text}
        for text in stop:
            ids = tokenizer.encode(text)
            if len(ids) != 1:
                raise ValueError(f"stop: {text!r} is {len(ids)} tokens for this tokenizer, but must be one")
            stops.update(ids)
        tokens = generate(
            self.net,
            torch.tensor([start], device=self.device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=stops,
            seed=seed,
        )
        return self._decode(tokens, tokenizer, stops)

    @staticmethod
    def _decode(tokens: Iterator[Tensor], tokenizer: Tokenizer, stops: Collection[int]) -> Iterator[str]:
        decoder = StreamDecoder(tokenizer)
        for token in tokens:
            if int(token) in stops:
                break
            yield decoder.push(int(token))
        yield decoder.finish()

    def generate(self, prompt: str, **options: Any) -> str:
        """Return the whole text that `stream` yields, without the prompt; the same arguments."""
        return "".join(self.stream(prompt, **options))

    def write_documents(
        self,
        prompts: Sequence[str],
        keys: Tensor,
        *,
        prompt_tokens: int = 16,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> list[tuple[str, bool]]:
        """Generate documents, each up to its end or `max_new_tokens`.

        Args:
            prompts: the text that each document starts with.
            keys: keys of the random draws, [B] int64 on the net's device.
            prompt_tokens: number of tokens of a beginning to use as the prompt, 0 or above; a shorter beginning is used
                whole.
            max_new_tokens, temperature, top_k, top_p: as for `stream`.

        Returns:
            The documents including their prompts, each with whether it reached its end.

        Raises:
            ValueError: for arguments out of range.
        """
        tokenizer = self._known_tokenizer()
        if prompt_tokens < 0:
            raise ValueError(f"--prompt_tokens {prompt_tokens} must not be negative")
        end = tokenizer.end_of_text
        starts = [
            [end, *tokenizer.encode(text)[:prompt_tokens]] for text in prompts
        ]  # as documents are stored in the data
        written: dict[int, tuple[str, bool]] = {}
        for length in sorted({len(tokens) for tokens in starts}):
            rows = [row for row, tokens in enumerate(starts) if len(tokens) == length]
            start = torch.tensor([starts[row] for row in rows], device=self.device)
            tokens = generate(
                self.net,
                start,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_tokens=(end,),
                keys=keys[rows],
            )
            whole = torch.cat([start[:, 1:], torch.stack(list(tokens), 1)], 1).tolist()
            for row, ids in zip(rows, whole, strict=True):
                ended = end in ids
                text = tokenizer.decode(ids[: ids.index(end)] if ended else ids)
                written[row] = (text if ended else text.rstrip("\ufffd"), ended)  # a character may be truncated
        return [written[row] for row in range(len(starts))]

    def sample_on_policy(self, batch: TextBatch, keys: Tensor, *, max_new_tokens: int, temperature: float) -> TextBatch:
        """Replace the end of each sequence by tokens that the net generates, and make these the only targets.

        The net writes `max_new_tokens` tokens after the last token that it reads. Documents end and begin as in any
        text.

        Args:
            batch: B sequences of T tokens.
            keys: keys of the random draws, [B] int64.
            max_new_tokens: 1 to T.
            temperature: as for `stream`.
        """
        T = batch.tokens.shape[1]
        if not 1 <= max_new_tokens <= T:
            raise ValueError(
                f"max_new_tokens {max_new_tokens}: of sequences of {T} tokens, 1 to {T} can be written by the net"
            )
        start = batch.tokens[:, : T + 1 - max_new_tokens]
        steps = generate(self.net, start, max_new_tokens=max_new_tokens, temperature=temperature, keys=keys)
        new = torch.stack(list(steps), 1)  # [B, max_new_tokens]
        if torch.is_autocast_enabled(new.device.type):
            torch.clear_autocast_cache()  # else autocast would reuse, in training, weights that were cast without gradients
        unread = start.new_full((len(start), start.shape[1] - 1), IGNORE_INDEX)
        return batch._replace(tokens=torch.cat([start, new[:, :-1]], 1), targets=torch.cat([unread, new], 1))
