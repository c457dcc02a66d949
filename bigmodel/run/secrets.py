"""Secrets in a configuration or a command line, which are not written to the run directory or to W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

MASK = "***"
# Last part of a setting's name; not pad_token and the like, which are words of a vocabulary.
_NAME = re.compile(
    r"(.*_)?(pass(word|wd|phrase)|secret|secret_key|api_?key|access_key|private_key|credentials?)"
    r"|((auth|access|api|hf|hub|bearer|refresh|session|wandb|github)_?)?token",
    re.IGNORECASE,
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]+)@")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d_[A-Za-z0-9_]{16,}")
_VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def mask_secrets(value: Any, key: str = "") -> tuple[Any, list[str]]:
    """Return a copy of a configuration with `***` in place of each secret, and the settings that had one.

    A secret is the text of a setting with a name such as token, api_key, password or secret; the password in a URL; a
    token of Hugging Face or W&B; and the value of one of their environment variables.
    """
    if isinstance(value, dict):
        parts = {
            name: mask_secrets(one, key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".lstrip("."))
            for name, one in value.items()
        }
        return {name: one for name, (one, _) in parts.items()}, [found for _, some in parts.values() for found in some]
    if isinstance(value, list | tuple):
        entries = [mask_secrets(one, key) for one in value]
        return [one for one, _ in entries], list(dict.fromkeys(found for _, some in entries for found in some))
    name = key.rpartition(".")[2]
    number = isinstance(value, int | float) and not isinstance(value, bool) and "token" not in name.lower()
    if _NAME.fullmatch(name) and (isinstance(value, str) or number) and value != "":
        return MASK, [key]
    if not isinstance(value, str):
        return value, []
    masked = _mask_text(value)
    return masked, [key] if masked != value else []


def mask_command(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, with `***` in place of each secret."""
    masked: list[str] = []
    flag = ""
    for word in words:
        key, equals, value = word.partition("=")
        if key.startswith("--") and equals:
            masked.append(f"{key}={_mask_value(key, value)}")
        else:
            masked.append(_mask_value(flag, word) if flag and not word.startswith("--") else _mask_text(word))
        flag = word if word.startswith("--") and not equals else ""
    return masked


def check_masked(config: Any) -> None:
    """Check that a configuration read from a run directory has no masked secret left.

    Raises:
        ValueError: if it has; the message names the flag to give.
    """
    if missing := _masked(config):
        raise ValueError(
            f"--{missing[0]}: a run's config.yaml has {MASK} in place of this secret: give it again, --{missing[0]} VALUE"
        )


def _masked(value: Any, key: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            found
            for name, one in value.items()
            for found in _masked(one, key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".lstrip("."))
        ]
    if isinstance(value, list):
        return [found for one in value for found in _masked(one, key)]
    return [key] if isinstance(value, str) and (value == MASK or f":{MASK}@" in value) else []


def _mask_value(flag: str, value: str) -> str:
    name = flag.lstrip("-").rpartition(".")[2].replace("-", "_")
    return MASK if _NAME.fullmatch(name) and value else _mask_text(value)


def _mask_text(text: str) -> str:
    text = _TOKEN.sub(MASK, _PASSWORD_IN_URL.sub(rf"\1:{MASK}@", text))
    for variable in _VARIABLES:
        if len(value := os.environ.get(variable, "")) >= 8:
            text = text.replace(value, MASK)
    return text
