"""Tokenizer configurations: trained byte-level BPE, Hugging Face, bytes, characters, or the tokenizer of a run.

This module imports neither torch nor Lightning, because it runs in small worker processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from bigmodel.tasks.language_modeling.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharacterTokenizer,
    SubwordTokenizer,
    Tokenizer,
)


class TokenizerConfig(ABC):
    """Configuration of a tokenizer."""

    @property
    def max_train_bytes(self) -> int | None:
        """Maximum size of the text for `build`, evenly sampled [bytes]; 0: none; None: the whole train split."""
        return 0

    def settings(self) -> dict[str, Any]:
        """Settings that, with the training text, determine the tokenizer; part of the cache key of prepared text."""
        return {"tokenizer": type(self).__qualname__, **asdict(self)}  # type: ignore[call-overload]

    @abstractmethod
    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Build the tokenizer from pieces of the training text."""


@dataclass(frozen=True)
class BPE(TokenizerConfig):
    """Byte-level BPE (GPT-2's pre-tokenizer) trained on the training split. Encodes any text without loss.

    Args:
        vocab_size: number of tokens, including the 256 bytes and end-of-text. A small text may give fewer.
        train_bytes: maximum size of the text that the tokenizer is trained on, evenly sampled [bytes of UTF-8].
            Memory: about 0.15 GB for 16 MB of source code, 0.5 GB for 100 MB.
    """

    vocab_size: int = 8192
    train_bytes: int = 2**24

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise ValueError(
                f"--data.tokenizer.vocab_size {self.vocab_size}: must be at least 257 (256 bytes and end-of-text)"
            )
        if self.train_bytes < 1:
            raise ValueError(f"--data.tokenizer.train_bytes {self.train_bytes}: must be at least 1")

    @property
    def max_train_bytes(self) -> int:
        return self.train_bytes

    def build(self, texts: Iterable[str]) -> SubwordTokenizer:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(iter(texts), trainer)
        return SubwordTokenizer(backend, eos_token_id=backend.get_vocab()[END_OF_TEXT])


@dataclass(frozen=True)
class Bytes(TokenizerConfig):
    """The 256 bytes of UTF-8, and end-of-text."""

    def build(self, texts: Iterable[str]) -> ByteTokenizer:
        return ByteTokenizer()


@dataclass(frozen=True)
class Characters(TokenizerConfig):
    """The characters (Unicode code points) of the training split, sorted.

    A character that occurs only in another split is an error, because it has no loss: use `Bytes` or `BPE` instead.
    """

    @property
    def max_train_bytes(self) -> None:
        return None

    def build(self, texts: Iterable[str]) -> CharacterTokenizer:
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharacterTokenizer("".join(sorted(characters)))


@dataclass(frozen=True)
class Pretrained(TokenizerConfig):
    """A Hugging Face tokenizer.

    Args:
        path: a folder with tokenizer.json, or anything else that transformers' AutoTokenizer accepts (a folder in an
            older format, a name on the hub).
        eos_token: the token that ends a document; by default the tokenizer's own.
    """

    path: str
    eos_token: str | None = None

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.build().to_json().encode()).hexdigest()
        return {"tokenizer": type(self).__qualname__, "sha256": digest}

    def build(self, texts: Iterable[str] = ()) -> SubwordTokenizer:
        """Load the tokenizer.

        Raises:
            ValueError: if the folder lacks a file, or the token that ends a document is not in the vocabulary.
        """
        backend, eos = self.read()
        eos_token_id = backend.token_to_id(eos)
        if eos_token_id is None:
            raise ValueError(f"--data.tokenizer.eos_token {eos!r} is not in the vocabulary of {self.path}")
        return SubwordTokenizer(backend, eos_token_id)

    def read(self) -> tuple[Backend, str]:
        """Return the tokenizer of the library, and the token that ends a document, which may not be in its vocabulary.

        Raises:
            ValueError: if the folder lacks a file, or defines no such token.
        """
        folder = Path(self.path).expanduser()
        if not (folder / "tokenizer.json").is_file():
            return self._from_transformers(folder)
        try:
            backend = Backend.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read by tokenizers: {error}") from error
        return backend, self.eos_token or _eos_token(folder)

    def _from_transformers(self, folder: Path) -> tuple[Backend, str]:
        if folder.is_dir():
            _check_old_format(folder)
        elif self.path.startswith((os.sep, ".", "~")):
            raise ValueError(f"--data.tokenizer.path {self.path}: no such folder")
        from transformers import AutoTokenizer  # takes seconds, so it is imported only where needed

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if folder.is_dir() else self.path, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ValueError(
                f"--data.tokenizer.path {self.path}: not a folder with tokenizer.json, and transformers cannot load it:"
                f" {error}"
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"--data.tokenizer.path {self.path}: transformers has no fast version of this tokenizer")
        eos = self.eos_token or tokenizer.eos_token
        if eos is None:
            raise ValueError(f"{self.path} defines no eos_token: set --data.tokenizer.eos_token")
        return tokenizer.backend_tokenizer, eos


@dataclass(frozen=True)
class FromRun(TokenizerConfig):
    """The tokenizer of a trained language model: for text generated by the model, or for a student of the model.

    Args:
        run: a run directory, `last`, the end of a run's name, or a checkpoint.
    """

    run: str

    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.build().to_json().encode()).hexdigest()
        return {"tokenizer": type(self).__qualname__, "sha256": digest}

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        """Load the tokenizer.

        Raises:
            ValueError: if there is no such run, or it has no tokenizer.
        """
        from bigmodel.run import describe  # imports Lightning, which the processes that tokenize do not need

        saved = describe(self.run)["saved"]
        if "tokenizer" not in saved:
            raise ValueError(
                f"--data.tokenizer.run {self.run} is not a language model: its checkpoint has no tokenizer"
            )
        return Tokenizer.from_json(saved["tokenizer"])


@dataclass(frozen=True)
class Trained(TokenizerConfig):
    """The tokenizer of the run that is evaluated.

    Args:
        json: the tokenizer, as `Tokenizer.to_json` returns it.
    """

    json: str

    def settings(self) -> dict[str, Any]:
        return {"tokenizer": "FromRun", "sha256": hashlib.sha256(self.json.encode()).hexdigest()}

    def build(self, texts: Iterable[str] = ()) -> Tokenizer:
        return Tokenizer.from_json(self.json)


def _eos_token(folder: Path) -> str:
    """Return the `eos_token` of a folder in Hugging Face format."""
    names = ("tokenizer_config.json", "special_tokens_map.json")
    for path in (folder / name for name in names):
        if path.is_file():
            try:
                token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
            except (json.JSONDecodeError, AttributeError) as error:
                raise ValueError(f"{path} is not a JSON object: {error}") from error
            if token is not None:
                return str(token["content"] if isinstance(token, dict) else token)
    raise ValueError(
        f"{folder} defines no eos_token (in {' or '.join(names)}): set --data.tokenizer.eos_token to the token that ends a"
        " document"
    )


def _check_old_format(folder: Path) -> None:
    """Raise an error that names the file that an incomplete folder lacks."""
    present = {path.name for path in folder.iterdir()}
    for one, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if one in present and other not in present:
            raise ValueError(f"the tokenizer folder {folder} is incomplete: it has {one}, but {other} is missing")
    if not present & {"vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"}:
        raise ValueError(
            f"the tokenizer folder {folder} is incomplete: tokenizer.json is missing (also vocab.json with merges.txt,"
            " vocab.txt and tokenizer.model)"
        )
