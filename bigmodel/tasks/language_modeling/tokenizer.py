"""Conversion of text to token ids and back: subwords, bytes, characters.

A `Tokenizer` is made by a `TokenizerConfig` (``tokenizer_config.py``) and saved as one JSON string, ``tokenizer.json``
in the folder of prepared text and in every checkpoint::

    {"kind": "subwords" | "bytes" | "characters", ...}

Special tokens in a text are plain text: the characters ``<|endoftext|>`` inside a document are encoded as these 13
characters, never as the token that ends a document. This module imports neither torch nor Lightning, because it runs in
small worker processes.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
_NUM_CONTEXT = 4  # tokens, at least one whole character, before those that are decoded


class Tokenizer(ABC):
    """Interface of all tokenizers.

    Attributes:
        vocab_size: number of token ids; every id is below it.
        eos_token_id: id of the token that follows each document.
        cut: pattern of candidate places to cut a long text without changing its tokens (to be checked: the text around
            the cut must have the same tokens in one piece and in two); None: anywhere.
    """

    kind: ClassVar[str]
    cut: ClassVar[re.Pattern[str] | None] = None
    vocab_size: int
    eos_token_id: int

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
        """Return the state for `_load`."""

    @classmethod
    @abstractmethod
    def _load(cls, state: dict[str, Any]) -> Tokenizer: ...

    def to_json(self) -> str:
        """Return the whole tokenizer as one string, for `from_json`."""
        return json.dumps({"kind": self.kind, **self._state()}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """Load a tokenizer written by `to_json`.

        Raises:
            ValueError: if the text was not written by `to_json`.
        """
        kinds: dict[str, type[Tokenizer]] = {t.kind: t for t in (SubwordTokenizer, ByteTokenizer, CharacterTokenizer)}
        try:
            state = json.loads(text)
            return kinds[state.pop("kind")]._load(state)
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"not a tokenizer that bigmodel saved: {text[:60]!r}...; kinds: {sorted(kinds)}"
            ) from error


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: trained here, or from Hugging Face.

    Args:
        backend: the object of the library, available as `.backend` (its `save` writes Hugging Face's tokenizer.json).
        eos_token_id: id of the token that ends a document.
    """

    kind = "subwords"
    # In all common pre-tokenizers a piece begins with white space or has none inside, except line ends after
    # punctuation.
    cut = re.compile(r"(?<=\S)(?=\s)")

    def __init__(self, backend: Backend, eos_token_id: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # text that looks like a special token is encoded as plain text
        self.backend = backend
        self.eos_token_id = eos_token_id
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
        return {"end_of_text": self.eos_token_id, "tokenizers": json.loads(self.backend.to_str())}

    @classmethod
    def _load(cls, state: dict[str, Any]) -> SubwordTokenizer:
        return cls(Backend.from_str(json.dumps(state["tokenizers"])), state["end_of_text"])


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 for end-of-text."""

    kind = "bytes"
    vocab_size = 257
    eos_token_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        end = END_OF_TEXT.encode()
        return b"".join(end if t == self.eos_token_id else bytes((t,)) for t in tokens).decode("utf-8", "replace")

    def _state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _load(cls, state: dict[str, Any]) -> ByteTokenizer:
        return cls()


class UnknownCharacter(ValueError):
    """A character outside a `CharacterTokenizer`'s vocabulary, at `position` [characters] of the text."""

    def __init__(self, character: str, position: int) -> None:
        super().__init__(
            f"character {character!r} at position {position:,} of this text does not occur in the training text, whose"
            " characters are the vocabulary of the tokenizer Characters"
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
        self.eos_token_id = len(characters)
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
    """Decode tokens one by one, and return text as soon as it is final.

    An incomplete UTF-8 character is buffered. The concatenated results of `push` and `finish` are what the tokens add to
    `decode` of the context: `decode(context + tokens)` without its first `len(decode(context))` characters.

    Args:
        tokenizer: the tokenizer.
        context: tokens of the text that is continued, where many tokenizers leave out the space before the first word.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._decode = tokenizer.decode
        self._tokens: list[int] = list(context[-_NUM_CONTEXT:])
        self._num_returned = len(self._decode(self._tokens)) if self._tokens else 0  # characters

    def push(self, token: int) -> str:
        """Return the text completed by this token; may be empty."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        final = len(text.rstrip("\ufffd"))
        piece = text[self._num_returned : final]
        self._num_returned = max(self._num_returned, final)
        if final == len(text) and len(self._tokens) > 4 * _NUM_CONTEXT:
            self._tokens = self._tokens[-_NUM_CONTEXT:]
            self._num_returned = len(self._decode(self._tokens))
        return piece

    def finish(self) -> str:
        """Return the buffered text."""
        return self._decode(self._tokens)[self._num_returned :] if self._tokens else ""
