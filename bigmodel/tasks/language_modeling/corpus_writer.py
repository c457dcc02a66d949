"""`bigmodel generate RUN --documents N --out FOLDER`: generate a corpus with a trained model, to train a student on.

Sequence-level distillation, Kim and Rush 2016 (arXiv 1606.07947), with sampled text instead of the most likely text: a
prompt has no single right continuation.

A document is a function of the weights, its number, the seed and the flags. It does not depend on the batch it is
generated in, except for rounding errors. All files are written to a temporary folder, which is renamed at the end; so a
folder with the final name is complete::

    FOLDER/0000000.txt ...        one document each
    FOLDER/generated.json         weights, seed and flags
    .FOLDER.partial/              the temporary folder
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.data.cache import progress, publish, say, write_text

_BATCH_SIZE = 32  # documents
_TRUNCATED = "cut"  # file: numbers of the documents that have no end


def write_documents(name: str, task: Any, data: Any, weights: str, options: dict[str, Any]) -> None:
    """Generate the missing documents, with a progress bar.

    Args:
        name: of the run, for messages.
        task: loaded, on its device.
        data: data module of the run, without `setup`.
        weights: digest of the weights.
        options: flags by name: documents, out, seed, batch_size and those of the task's `write_documents`.

    Raises:
        ValueError: for a flag that is out of range or unknown, a folder that exists already, or a task that cannot
            generate documents.
    """
    from bigmodel.protocols import SupportsCorpusGeneration

    if not isinstance(task, SupportsCorpusGeneration) or not hasattr(data, "prompts"):
        raise ValueError(
            f"{name}: {type(task).__name__} cannot generate documents (bigmodel.protocols.SupportsCorpusGeneration)"
        )
    count, seed = _number(options, "documents", 1), _number(options, "seed", 0, default=0)
    batch_size = _number(options, "batch_size", 1, default=_BATCH_SIZE)
    if "out" not in options:
        raise ValueError("--out is missing: set it to a new folder")
    final = Path(str(options.pop("out"))).expanduser()
    accepted = [
        name for name, p in inspect.signature(task.write_documents).parameters.items() if p.kind == p.KEYWORD_ONLY
    ]
    if unknown := options.keys() - set(accepted):
        flags = ", ".join(f"--{name}" for name in ("documents", "out", "seed", "batch_size", *accepted))
        raise ValueError(f"unknown flag --{sorted(unknown)[0]}; the flags of --documents are {flags}")
    partial = _open_partial(final, {"weights": weights, "documents": count, "seed": seed, **options})
    _generate_missing(partial, task, data, count, seed, batch_size, options)
    truncated = _truncated(partial)
    (partial / _TRUNCATED).unlink(missing_ok=True)
    publish(partial, final)
    say(
        f"{count:,} documents in {final}" + (f"; {len(truncated):,} truncated by --max_new_tokens" if truncated else "")
    )


def _number(options: dict[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = options.pop(name, default)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"--{name} {value}: must be a whole number, at least {least}")
    return value


def _open_partial(final: Path, settings: Mapping[str, Any]) -> Path:
    """Return the temporary folder: a new one, or one of an interrupted command with the same settings."""
    if final.exists():
        raise ValueError(f"--out {final} exists: set another folder, or remove it")
    partial = final.with_name(f".{final.name}.partial")
    file = partial / "generated.json"
    if file.exists():
        started = json.loads(file.read_text())
        if differing := [key for key in settings.keys() | started.keys() if settings.get(key) != started.get(key)]:
            raise ValueError(
                f"{partial} was started with different {' and '.join(sorted(differing))}: set the same flags and weights to"
                f" continue, or remove it. Its settings: {started}"
            )
    else:
        partial.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(settings, indent=2) + "\n")
    return partial


def _generate_missing(
    folder: Path, task: Any, data: Any, count: int, seed: int, batch_size: int, options: Mapping[str, Any]
) -> None:
    import torch

    from bigmodel.data.stateless_rng import sample_keys

    with progress("generating", count, "documents") as advance:
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            files = {number: folder / f"{number:07}.txt" for number in numbers}
            if not all(file.exists() for file in files.values()):
                keys = sample_keys(seed, 0, torch.tensor(numbers, device=task.device))
                written = task.write_documents(data.prompts(numbers, seed), keys, **options)
                if new := [str(number) for number, (_, ended) in zip(numbers, written, strict=True) if not ended]:
                    _write(folder / _TRUNCATED, "\n".join(sorted({*_truncated(folder), *new})))
                for file, (text, _) in zip(files.values(), written, strict=True):
                    _write(file, text)
            advance(len(numbers))


def _truncated(folder: Path) -> list[str]:
    file = folder / _TRUNCATED
    return file.read_text().split() if file.exists() else []


def _write(file: Path, text: str) -> None:
    """Write a file atomically."""
    new = file.with_suffix(".new")
    write_text(new, text)
    new.replace(file)
