"""Strict loading of weights into a module."""

from __future__ import annotations

from torch import Tensor, nn


def load_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into a module strictly.

    Args:
        module: the module to load into.
        weights: tensors by name, as in `module.state_dict()`.

    Raises:
        ValueError: with a list of the names that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    problems = dict.fromkeys(own.keys() - weights.keys(), "missing")
    problems |= dict.fromkeys(weights.keys() - own.keys(), "unexpected")
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            problems[name] = f"shape {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
    if problems:
        lines = sorted(f"  {name}: {problem}" for name, problem in problems.items())
        more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ValueError(
            f"the weights do not fit this {type(module).__name__} (another architecture or vocabulary?):\n"
            + "\n".join(lines[:20])
            + more
        )
    module.load_state_dict(weights)
