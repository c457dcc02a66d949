"""`bigmodel generate RUN --documents N --out FOLDER`: generate a corpus with a trained model, to train a student on.

Sequence-level distillation, Kim and Rush 2016 (arXiv 1606.07947), with sampled text instead of the most likely text: a
model that continues a text has no single right answer.

A document is a function of the weights, its number, the seed and the flags. It does not depend on the batch it is
generated in, except for rounding errors. All files are written to a temporary folder, which is renamed when the last is
written; so a folder with the final name is complete::

    FOLDER/0000000.txt ...        a document each
    FOLDER/generated.json         what they are a function of
    .FOLDER.partial/              while they are being written
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.data.cache import progress, publish, say, write_text

_BATCH_SIZE = 32  # documents
_CUT = "cut"  # numbers of the documents that reached no end


def write_documents(name: str, task: Any, data: Any, weights: str, options: dict[str, Any]) -> None:
    """Write the missing documents, with a progress bar.

    Args:
        name: of the run, for messages.
        task: loaded, on its device.
        data: data module of the run; not set up.
        weights: digest of the weights.
        options: flags by name: documents, out, seed, batch_size and those of the task's `write_documents`.

    Raises:
        ValueError: for a flag that is out of range or unknown, a folder that exists already, or a task that cannot
            generate documents.
    """
    from bigmodel.protocols import SupportsCorpusGeneration

    if not isinstance(task, SupportsCorpusGeneration) or not hasattr(data, "prompts"):
        raise ValueError(
            f"{name} is a {type(task).__name__}, which writes no documents (bigmodel.protocols.SupportsCorpusGeneration)"
        )
    count, seed = _number(options, "documents", 1), _number(options, "seed", 0, default=0)
    batch_size = _number(options, "batch_size", 1, default=_BATCH_SIZE)
    if "out" not in options:
        raise ValueError("--out is needed: a folder for the documents that is not there yet")
    final = Path(str(options.pop("out"))).expanduser()
    accepted = [
        name for name, p in inspect.signature(task.write_documents).parameters.items() if p.kind == p.KEYWORD_ONLY
    ]
    if unknown := options.keys() - set(accepted):
        flags = ", ".join(f"--{name}" for name in ("documents", "out", "seed", "batch_size", *accepted))
        raise ValueError(f"no flag --{sorted(unknown)[0]}; writing documents takes {flags}")
    partial = _begin(final, {"weights": weights, "documents": count, "seed": seed, **options})
    _fill(partial, task, data, count, seed, batch_size, options)
    cut = _cut(partial)
    (partial / _CUT).unlink(missing_ok=True)
    publish(partial, final)
    say(f"{count:,} documents in {final}" + (f"; {len(cut):,} met --max_new_tokens before their end" if cut else ""))


def _number(options: dict[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = options.pop(name, default)
    if not isinstance(value, int) or value < least:
        raise ValueError(f"--{name} {value}: a whole number of at least {least} is needed")
    return value


def _begin(final: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder to fill: a new one, or one that was begun with the same settings."""
    if final.exists():
        raise ValueError(f"--out {final} is there already: name another folder, or remove it")
    partial = final.with_name(f".{final.name}.partial")
    file = partial / "generated.json"
    if file.exists():
        begun = json.loads(file.read_text())
        if differing := [key for key in settings.keys() | begun.keys() if settings.get(key) != begun.get(key)]:
            raise ValueError(
                f"{partial} was begun with other {' and '.join(sorted(differing))}: give the same flags and weights to go"
                f" on, or remove it. It was: {begun}"
            )
    else:
        partial.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(settings, indent=2) + "\n")
    return partial


def _fill(
    folder: Path, task: Any, data: Any, count: int, seed: int, batch_size: int, options: Mapping[str, Any]
) -> None:
    import torch

    from bigmodel.data.stateless_rng import sample_keys

    with progress("writing", count, "documents") as advance:
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            files = {number: folder / f"{number:07}.txt" for number in numbers}
            if not all(file.exists() for file in files.values()):
                keys = sample_keys(seed, 0, torch.tensor(numbers, device=task.device))
                written = task.write_documents(data.prompts(numbers, seed), keys, **options)
                if new := [str(number) for number, (_, ended) in zip(numbers, written, strict=True) if not ended]:
                    _write(folder / _CUT, "\n".join(sorted({*_cut(folder), *new})))
                for file, (text, _) in zip(files.values(), written, strict=True):
                    _write(file, text)
            advance(len(numbers))


def _cut(folder: Path) -> list[str]:
    file = folder / _CUT
    return file.read_text().split() if file.exists() else []


def _write(file: Path, text: str) -> None:
    """Write a file atomically."""
    beside = file.with_suffix(".new")
    write_text(beside, text)
    beside.replace(file)
