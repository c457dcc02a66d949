"""Strict loading of weights into a module, except for names that are excused."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import Tensor, nn


def load_weights(module: nn.Module, weights: dict[str, Tensor], excuse: Iterable[str] = ()) -> list[str]:
    """Load weights into a module strictly.

    Args:
        module: the module to load into.
        weights: tensors by name, as in `module.state_dict()`.
        excuse: patterns (`*` as in file names) of names that may be missing, unexpected or of another shape.

    Returns:
        The names that were excused and not loaded.

    Raises:
        ValueError: with a list of every other mismatch.
    """
    own, patterns = module.state_dict(), list(excuse)
    problems = dict.fromkeys(own.keys() - weights.keys(), "missing")
    problems |= dict.fromkeys(weights.keys() - own.keys(), "unexpected")
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            problems[name] = f"shape {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
    excused = [name for name in problems if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    refused = sorted(f"  {name}: {problem}" for name, problem in problems.items() if name not in excused)
    if refused:
        more = f"\n  and {len(refused) - 20} more" if len(refused) > 20 else ""
        raise ValueError(
            f"the weights do not fit this {type(module).__name__} (another architecture or vocabulary?):\n"
            + "\n".join(refused[:20])
            + more
        )
    module.load_state_dict({name: tensor for name, tensor in weights.items() if name not in excused}, strict=False)
    return sorted(excused)
