"""Conversion of text to token ids and back: subwords, bytes, characters.

A `Tokenizer` is made by a `TokenizerConfig` (``tokenizer_config.py``) and saved as one JSON string, ``tokenizer.json``
beside prepared text and inside every checkpoint::

    {"kind": "subwords" | "bytes" | "characters", ...}

Special tokens in a text are plain text: the characters ``<|endoftext|>`` inside a document are encoded as these 13
characters, and never as the token that ends a document. This module imports neither torch nor Lightning, because it
runs in small worker processes.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Interface of all tokenizers.

    Attributes:
        vocab_size: number of token ids; every id is below it.
        end_of_text: id of the token that follows each document.
        cut: pattern of places where a long text can perhaps be cut without changing its tokens (if the text around the
            cut has the same tokens in one piece and in two); None: anywhere.
    """

    kind: ClassVar[str]
    cut: ClassVar[re.Pattern[str] | None] = None
    vocab_size: int
    end_of_text: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without end-of-text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids. Bytes that are not UTF-8 become U+FFFD; end-of-text becomes ``<|endoftext|>``."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return the state from which `_load` makes this tokenizer again."""

    @classmethod
    @abstractmethod
    def _load(cls, state: dict[str, Any]) -> Tokenizer: ...

    def to_json(self) -> str:
        """Return the whole tokenizer as one string, for `from_json`."""
        return json.dumps({"kind": self.kind, **self._state()}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """Load the tokenizer that `to_json` wrote.

        Raises:
            ValueError: if the text was not written by `to_json`.
        """
        kinds: dict[str, type[Tokenizer]] = {t.kind: t for t in (Subwords, ByteTokenizer, CharacterTokenizer)}
        try:
            state = json.loads(text)
            return kinds[state.pop("kind")]._load(state)
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"not a tokenizer that bigmodel saved: {text[:60]!r}...; kinds: {sorted(kinds)}"
            ) from error


class Subwords(Tokenizer):
    """A tokenizer of the `tokenizers` library: trained here, or from Hugging Face.

    Args:
        backend: the object of the library, available as `.backend` (its `save` writes Hugging Face's tokenizer.json).
        end_of_text: id of the token that ends a document.
    """

    kind = "subwords"
    # In all common pre-tokenizers a piece begins with white space or has none inside, except line ends after
    # punctuation.
    cut = re.compile(r"(?<=\S)(?=\s)")

    def __init__(self, backend: Backend, end_of_text: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that looks like a special token is encoded as plain text
        self.backend = backend
        self.end_of_text = end_of_text
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.backend.decode(list(tokens), skip_special_tokens=False)
        return text

    def _state(self) -> dict[str, Any]:
        return {"end_of_text": self.end_of_text, "tokenizers": json.loads(self.backend.to_str())}

    @classmethod
    def _load(cls, state: dict[str, Any]) -> Subwords:
        return cls(Backend.from_str(json.dumps(state["tokenizers"])), state["end_of_text"])


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for end-of-text."""

    kind = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        end = END_OF_TEXT.encode()
        return b"".join(end if t == self.end_of_text else bytes((t,)) for t in tokens).decode("utf-8", "replace")

    def _state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _load(cls, state: dict[str, Any]) -> ByteTokenizer:
        return cls()


class UnknownCharacter(ValueError):
    """A character outside a `CharacterTokenizer`'s vocabulary, at `position` [characters] of the text."""

    def __init__(self, character: str, position: int) -> None:
        super().__init__(
            f"character {character!r} (number {position:,} of this text, from 0) does not occur in the training text,"
            " which is all that the tokenizer Characters knows"
        )
        self.character, self.position = character, position


class CharacterTokenizer(Tokenizer):
    """One token per Unicode code point.

    Args:
        characters: the vocabulary, in the order of its ids; end-of-text comes after it.
    """

    kind = "characters"

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.end_of_text = len(characters)
        self.vocab_size = len(characters) + 1
        self._ids = {character: i for i, character in enumerate(characters)}
        self._strings = [*characters, END_OF_TEXT]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text.

        Raises:
            UnknownCharacter: if the vocabulary lacks one of its characters.
        """
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UnknownCharacter(error.args[0], text.index(error.args[0])) from None

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join([self._strings[t] for t in tokens])

    def _state(self) -> dict[str, Any]:
        return {"characters": self.characters}

    @classmethod
    def _load(cls, state: dict[str, Any]) -> CharacterTokenizer:
        return cls(state["characters"])


class StreamDecoder:
    """Decodes a stream of tokens: takes tokens one by one, and returns text as soon as it is final.

    An unfinished UTF-8 character is held back. The joined results of `push` and `finish` equal `decode` of all tokens
    (for byte-level tokenizers, bytes and characters).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._tokens: list[int] = []
        self._shown = 0  # number of characters that were returned

    def push(self, token: int) -> str:
        """Return the text that this token completes; may be empty."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        certain = len(text.rstrip("\ufffd"))
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if certain == len(text) and len(self._tokens) > 16:
            # A few tokens remain as context, at least one whole character: some decoders treat the start of a text
            # differently.
            self._tokens = self._tokens[-4:]
            self._shown = len(self._decode(self._tokens))
        return piece

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._decode(self._tokens)[self._shown :]
