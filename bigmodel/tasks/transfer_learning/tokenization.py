"""Tokenization for a backbone: special tokens, sentence pairs, truncation.

A text is encoded once as a whole; truncation is done later on its tokens. The tokens that the tokenizer adds around a
text are found by encoding a letter::

    first + A + last                 one text     [CLS] a [SEP]
    first + A + between + B + last   a pair       [CLS] a [SEP] b [SEP]

If it adds none between two texts (GPT-2, Llama), the end-of-text token separates them. Text that looks like a special
token is encoded as plain text, so the first `between` after `first` is the end of A, and no further information is
needed.

T tokens.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel.data.cache import digest
from bigmodel.run.trust import import_saved_class


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens around texts.

    Attributes:
        first: token ids before the text.
        last: token ids after one text.
        between: token ids that separate a pair.
        pair_last: token ids after a pair.
        has_segments: True if the model reads token type ids.
    """

    first: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    pair_last: tuple[int, ...] = ()
    has_segments: bool = False


class TextEncoder(ABC):
    """Interface of all tokenizers of the task.

    Attributes:
        special_tokens: those around texts.
        pad_id: padding token id; masked, so any will do.
        max_length: T, number of positions of the model; None: unlimited.
    """

    special_tokens: SpecialTokens
    pad_id: int
    max_length: int | None

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the whole encoder as plain values, for `from_dict`."""

    @property
    def fingerprint(self) -> str:
        """Digest that changes when texts may have other tokens."""
        plain = self.to_dict()
        del plain["max_length"]
        return digest(plain)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[np.ndarray]:
        """Return tokens [T] int32 of each text with its special tokens, not truncated.

        Args:
            texts: to encode.
            pairs: a second text for each.

        Raises:
            ValueError: if there is no separator for the texts of a pair.
        """
        special, wholes = self.special_tokens, self.tokenize(texts)
        if pairs is None:
            return [np.array([*special.first, *ids, *special.last], np.int32) for ids in wholes]
        if not special.between:
            raise ValueError(
                "--data.pair_column requires a tokenizer with a separator or an end-of-text token: set it to null, and put"
                " both texts into one column"
            )
        seconds = self.tokenize(pairs)
        return [
            np.array([*special.first, *a, *special.between, *b, *special.pair_last], np.int32)
            for a, b in zip(wholes, seconds, strict=True)
        ]

    def truncate(self, tokens: np.ndarray, max_length: int | None) -> np.ndarray:
        """Return at most `max_length` of the tokens [T], special tokens kept.

        A text is truncated at its end; of a pair the longer one until both are of equal length, then both.

        Raises:
            ValueError: if not even the special tokens and one of each text fit.
        """
        if max_length is None or len(tokens) <= max_length:
            return tokens
        special, second = self.special_tokens, self._second(tokens)
        first, last = len(special.first), special.last if second is None else special.pair_last
        room = self.num_text_tokens(max_length, second is not None)
        if second is None:
            return np.concatenate([tokens[: first + room], tokens[len(tokens) - len(last) :]])
        end = second - len(special.between)
        a, b = end - first, len(tokens) - len(last) - second
        shorter = min(a, b, room // 2)
        keep_a, keep_b = (shorter, room - shorter) if a <= b else (room - shorter, shorter)
        parts = (tokens[: first + keep_a], tokens[end : second + keep_b], tokens[len(tokens) - len(last) :])
        return np.concatenate(parts)

    def num_text_tokens(self, max_length: int, paired: bool) -> int:
        """Return the number of tokens in `max_length` that are not special.

        Raises:
            ValueError: if there is not one for each text.
        """
        special = self.special_tokens
        around = len(special.first) + len(special.between + special.pair_last if paired else special.last)
        if max_length < around + 1 + paired:
            raise ValueError(
                f"--data.max_length {max_length} is too small: {around} tokens are special, so at least"
                f" {around + 1 + paired} is accepted"
            )
        return max_length - around

    def segments(self, tokens: np.ndarray) -> np.ndarray:
        """Return token type ids [T] int32: 1 from the second text of a pair on, if the model reads them, else 0."""
        segments = np.zeros(len(tokens), np.int32)
        if self.special_tokens.has_segments and (second := self._second(tokens)) is not None:
            segments[second:] = 1
        return segments

    def _second(self, tokens: np.ndarray) -> int | None:
        """Return the start of the second text of a pair; None if there is one text."""
        special = self.special_tokens
        if not special.between:
            return None
        first = len(special.first)
        found = np.flatnonzero(tokens[first:] == special.between[0])
        if not len(found) or (special.last and first + found[0] + len(special.last) == len(tokens)):
            return None
        return first + int(found[0]) + len(special.between)

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> TextEncoder:
        """Restore the encoder from `to_dict`.

        Raises:
            ValueError: if it is not the state of an encoder.
        """
        if plain.get("kind") == "transformers":
            from tokenizers import Tokenizer

            backend = Tokenizer.from_str(plain["tokenizer"])
            return TransformersEncoder(backend, plain["pad_id"], plain["end_id"], plain["max_length"])
        if plain.get("kind") == "bigmodel":
            tokenizer = import_saved_class(plain["class"].replace(":", ".")).from_json(plain["tokenizer"])
            return LanguageModelEncoder(tokenizer, plain["max_length"])
        raise ValueError(f"not the saved state of a text encoder: {sorted(plain)}")


class TransformersEncoder(TextEncoder):
    """A fast tokenizer of `transformers`; `read_encoder` makes one from a folder.

    Args:
        backend: the `tokenizers.Tokenizer` in it, which is copied.
        pad_id: id of the padding token; None: 0.
        end_id: id of the end-of-text token; None: there is none.
        max_length: T that the model has positions for; None: any number.
    """

    def __init__(self, backend: Any, pad_id: int | None, end_id: int | None, max_length: int | None) -> None:
        self.backend = type(backend).from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # text that looks like a special token is encoded as plain text
        self.pad_id, self.end_id, self.max_length = pad_id or 0, end_id, max_length
        self.special_tokens = self._find_special_tokens()

    def _find_special_tokens(self) -> SpecialTokens:
        one, two = self.backend.encode("a"), self.backend.encode("a", "a")
        if not one.ids:
            raise ValueError("the tokenizer returns no token for the text 'a': one for English text is required")
        a = [i for i, text in enumerate(one.sequence_ids) if text == 0]
        first, last = one.ids[: a[0]], one.ids[a[-1] + 1 :]
        of_first = [i for i, text in enumerate(two.sequence_ids) if text == 0]
        of_second = [i for i, text in enumerate(two.sequence_ids) if text == 1]
        between, pair_last = two.ids[of_first[-1] + 1 : of_second[0]], two.ids[of_second[-1] + 1 :]
        has_segments = bool(between) and two.type_ids[of_second[0]] == 1
        if not between and self.end_id is not None:
            between = [self.end_id]
        return SpecialTokens(tuple(first), tuple(last), tuple(between), tuple(pair_last), has_segments)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "transformers",
            "tokenizer": self.backend.to_str(),
            "pad_id": self.pad_id,
            "end_id": self.end_id,
            "max_length": self.max_length,
        }


class LanguageModelEncoder(TextEncoder):
    """The tokenizer of a language model trained with bigmodel. As in training, a text follows an end-of-text token;
    another separates a pair.

    Args:
        tokenizer: has `encode_batch(texts)` (token ids of each), `eos_token_id`, `to_json()`, and a class with
            `from_json(text)`.
        max_length: T, number of positions of the model; None: unlimited.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.pad_id = end = int(tokenizer.eos_token_id)
        self.special_tokens = SpecialTokens(first=(end,), between=(end,))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer.encode_batch(texts)
        return found

    def to_dict(self) -> dict[str, Any]:
        kind = type(self.tokenizer)
        return {
            "kind": "bigmodel",
            "class": f"{kind.__module__}:{kind.__qualname__}",
            "tokenizer": self.tokenizer.to_json(),
            "max_length": self.max_length,
        }


def read_encoder(path: str, max_length: int | None = None) -> TransformersEncoder:
    """Load the tokenizer of a folder or of the Hugging Face hub.

    Args:
        path: folder, or owner/name.
        max_length: T, number of positions of the model; None: the limit of the tokenizer.

    Raises:
        ValueError: if there is none, or it is not a fast one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no readable tokenizer (tokenizer.json): {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{path}: {type(tokenizer).__name__} is not a fast tokenizer: save one by"
            " AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)"
        )
    if max_length is None and tokenizer.model_max_length < 10**9:  # a huge number stands for none
        max_length = int(tokenizer.model_max_length)
    return TransformersEncoder(tokenizer.backend_tokenizer, tokenizer.pad_token_id, tokenizer.eos_token_id, max_length)
