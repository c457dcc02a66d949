"""Text generation with a language model: from a prompt, of whole documents, and within training batches.

B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bigmodel.nn.loss import IGNORE_INDEX
from bigmodel.tasks.language_modeling.data import TextBatch
from bigmodel.tasks.language_modeling.generation import Sampling, generate
from bigmodel.tasks.language_modeling.tokenizer import StreamDecoder, Tokenizer
from bigmodel.training import optimizers, schedules
from bigmodel.training.task import BaseTask


class TextGenerator(BaseTask):
    """Base class of a task with a net that maps tokens [B, T] to logits [B, T, V], and a tokenizer.

    The tokenizer is saved in checkpoints, so that a loaded task can generate without the data.
    """

    def __init__(self, optimizer: optimizers.OptimizerFactory, schedule: schedules.Schedule | None) -> None:
        super().__init__(optimizer, schedule)
        self.tokenizer: Tokenizer | None = None

    # SupportsGenerate: for `bigmodel generate`.

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: str | Collection[str] = (),
        seed: int | None = None,
    ) -> Iterator[str]:
        """Continue a text, and yield it piece by piece.

        Args:
            prompt: the text to continue; empty: start a new document.
            max_new_tokens, temperature, top_k, top_p: see `Sampling`.
            stop: token or tokens, each given as text, that end the generation, besides the end of the document.
            seed: the same seed gives the same text.

        Returns:
            Pieces of text, without the prompt.

        Raises:
            ValueError: for arguments out of range, or a task that has no tokenizer.
        """
        tokenizer = self._require_tokenizer()
        prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
        stop_tokens = {tokenizer.eos_token_id}
        for text in [stop] if isinstance(stop, str) else stop:
            if not isinstance(text, str):
                raise ValueError(f"stop: {text!r} is not text: set --stop TEXT, or --stop '[\"TEXT\", ...]'")
            ids = tokenizer.encode(text)
            if len(ids) != 1:
                raise ValueError(
                    f"stop: {text!r} is {len(ids)} tokens for this tokenizer, but must be one: set another --stop"
                )
            stop_tokens.update(ids)
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p)
        tokens = generate(
            self.net, torch.tensor([prompt_ids], device=self.device), sampling, stop_tokens=stop_tokens, seed=seed
        )
        return _decode(tokens, StreamDecoder(tokenizer, prompt_ids if prompt else ()), stop_tokens)

    def generate(self, prompt: str, **options: Any) -> str:
        """Return the whole text that `stream` yields; the same arguments."""
        return "".join(self.stream(prompt, **options))

    # SupportsCorpusGeneration: for `bigmodel generate --documents`.

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
            prompt_tokens: maximum number of tokens of a prompt, 0 or above; longer prompts are truncated.
            max_new_tokens, temperature, top_k, top_p: see `Sampling`.

        Returns:
            The documents including their prompts, each with True if it reached its end.

        Raises:
            ValueError: for arguments out of range.
        """
        tokenizer = self._require_tokenizer()
        if prompt_tokens < 0:
            raise ValueError(f"--prompt_tokens {prompt_tokens}: must be 0 or above")
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p)
        eos = tokenizer.eos_token_id
        # Each prompt follows an end-of-text token, as documents do in the data.
        starts = [[eos, *tokenizer.encode(text)[:prompt_tokens]] for text in prompts]
        documents: dict[int, tuple[str, bool]] = {}
        for length in sorted({len(start) for start in starts}):  # sequences of a batch have the same length
            rows = [row for row, start in enumerate(starts) if len(start) == length]
            tokens = torch.tensor([starts[row] for row in rows], device=self.device)
            new = torch.stack(list(generate(self.net, tokens, sampling, stop_tokens=(eos,), keys=keys[rows])), 1)
            for row, ids in zip(rows, torch.cat([tokens[:, 1:], new], 1).tolist(), strict=True):
                ended = eos in ids
                text = tokenizer.decode(ids[: ids.index(eos)] if ended else ids)
                documents[row] = (text if ended else text.rstrip("\ufffd"), ended)  # a character may be truncated
        return [documents[row] for row in range(len(starts))]

    # SupportsOnPolicySampling: for distillation.

    def sample_on_policy(self, batch: TextBatch, keys: Tensor, *, max_new_tokens: int, temperature: float) -> TextBatch:
        """Replace the end of each sequence by tokens that the net generates, and make these the only targets.

        The net generates `max_new_tokens` tokens after the last token of its input. Documents end and begin as in any
        text.

        Args:
            batch: B sequences of T tokens.
            keys: keys of the random draws, [B] int64.
            max_new_tokens: 1 to T.
            temperature: see `Sampling`.
        """
        T = batch.tokens.shape[1]
        if not 1 <= max_new_tokens <= T:
            raise ValueError(
                f"max_new_tokens {max_new_tokens}: must be in 1 to {T}, the number of tokens of a sequence"
            )
        start = batch.tokens[:, : T + 1 - max_new_tokens]
        new = torch.stack(list(generate(self.net, start, Sampling(max_new_tokens, temperature), keys=keys)), 1)
        if torch.is_autocast_enabled(new.device.type):
            torch.clear_autocast_cache()  # else autocast would reuse, in training, weights that were cast without gradients
        ignored = start.new_full((len(start), start.shape[1] - 1), IGNORE_INDEX)
        return batch._replace(tokens=torch.cat([start, new[:, :-1]], 1), targets=torch.cat([ignored, new], 1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        tokenizer = self._find_tokenizer()
        if tokenizer is not None:
            checkpoint["tokenizer"] = tokenizer.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "tokenizer" in checkpoint:
            self.tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])

    def restore_metadata(self, checkpoint: dict[str, Any]) -> None:
        """Restore the tokenizer from a checkpoint, before the text to evaluate is prepared with it."""
        self.on_load_checkpoint(checkpoint)

    def _find_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the data module, or else of the checkpoint."""
        data = self._trainer.datamodule if self._trainer is not None else None  # type: ignore[attr-defined]
        return getattr(data, "tokenizer", self.tokenizer)

    def _require_tokenizer(self) -> Tokenizer:
        tokenizer = self._find_tokenizer()
        if tokenizer is None:
            raise ValueError("this task has no tokenizer: load it from a run with bigmodel.load")
        return tokenizer


def _decode(tokens: Iterator[Tensor], decoder: StreamDecoder, stop_tokens: Collection[int]) -> Iterator[str]:
    for token in tokens:
        if int(token) in stop_tokens:
            break
        yield decoder.push(int(token))
    yield decoder.finish()
