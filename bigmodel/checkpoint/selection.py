"""Selection of an undamaged checkpoint of a run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from bigmodel.checkpoint.files import find_damage


def checkpoint_step(path: Path) -> int:
    """Return the optimizer step in a checkpoint's name, as in `last-<step>.ckpt`; -1 if it has none."""
    match = re.search(r"-(\d+)\.ckpt$", path.name)
    return int(match[1]) if match else -1


def find_checkpoint(directory: Path, which: str = "best", verify: bool = True) -> Path:
    """Return a run's checkpoint: `best` (by its monitored metric; the newest, if none), `last`, or a file's name.

    A damaged one is never returned. In place of a damaged `best` or `last`, another undamaged one is returned, and a
    line is printed: of the same kind (`best-...`) if there is one, and the newest of these.

    Args:
        directory: the run directory.
        which: `best`, `last`, or a file in its `checkpoints/`.
        verify: read the file and compare its checksum; False if another process does so (see `RunDirectory`).

    Raises:
        ValueError: if there is none, or the named file is damaged.
    """
    checkpoints = sorted(
        (directory / "checkpoints").glob("*.ckpt"), key=lambda path: (checkpoint_step(path), path.name)
    )
    if not checkpoints:
        raise ValueError(f"{directory} has no checkpoint: the run ended before its first one")
    if which in ("best", "last"):
        choices = checkpoints[::-1]
        name = _best_in_record(directory)
        best = [path for path in checkpoints if path.name == name]
        if which == "best" and best:
            same_kind = [path for path in choices if _kind(path) == _kind(best[0])]
            choices = list(dict.fromkeys([*best, *same_kind, *choices]))
        return _first_whole(choices) if verify else choices[0]
    named = [path for path in checkpoints if path.name == which or path.stem == which]
    if not named:
        raise ValueError(f"{directory} has no checkpoint {which}; there are {', '.join(p.name for p in checkpoints)}")
    problem = find_damage(named[0]) if verify else None
    if problem:
        raise ValueError(
            f"{named[0]} cannot be read as a checkpoint: {problem}. --checkpoint last selects an undamaged one"
        )
    return named[0]


def _best_in_record(directory: Path) -> str:
    """Return the name of the best checkpoint in run.json; empty if it has none, or is damaged."""
    path = directory / "run.json"
    try:
        best = json.loads(path.read_text()).get("best") if path.exists() else None
        return Path(best["checkpoint"]).name if best else ""
    except (ValueError, AttributeError, LookupError, TypeError, OSError) as error:
        print(f"{path} is damaged ({error}): which checkpoint is the best is unknown", file=sys.stderr, flush=True)
        return ""


def _kind(path: Path) -> str:
    """Return the kind of a checkpoint: `best` for `best-<step>.ckpt`."""
    return path.stem.rpartition("-")[0]


def _first_whole(choices: list[Path]) -> Path:
    """Return the first undamaged checkpoint; print which ones are damaged, and the steps lost."""
    damaged: list[tuple[Path, str]] = []
    for path in choices:
        problem = find_damage(path)
        if problem is not None:
            damaged.append((path, problem))
            continue
        for other, problem in damaged:
            lost = max(0, checkpoint_step(other) - checkpoint_step(path))
            what = f"{path.name} is used instead; optimizer steps lost: {lost:,}"
            print(f"{other} is damaged ({problem}): {what}", file=sys.stderr, flush=True)
        return path
    found = "".join(f"\n  {path.name}: {problem}" for path, problem in damaged)
    raise ValueError(f"no checkpoint in {choices[0].parent} can be read:{found}")
