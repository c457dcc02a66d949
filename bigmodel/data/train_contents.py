"""Sketch of the contents that a run was trained on, in its checkpoints: an evaluation on any of them is refused.

The sketch holds the smallest of the contents' hashes (bottom-k sketch, Cohen and Kaplan 2007): all of them in small
data; in large data a uniform sample, which finds a trained share s of the evaluated contents with probability
1 - (1 - s)^n, where n is the number of evaluated contents below the largest hash of the sketch.

N contents.
"""

from __future__ import annotations

import base64

import numpy as np

from bigmodel.data.stateless_rng import random_bits

MAX_HASHES = 2**12
_STREAM = 3  # splits are also drawn by hashes of contents, which must be independent


def _mixed(hashes: np.ndarray) -> np.ndarray:
    return np.unique(random_bits(hashes.astype(np.int64), _STREAM, 1)[:, 0].view(np.uint64))


def sketch(hashes: np.ndarray) -> str:
    """Return the sketch of contents with these hashes [N] int64, as text."""
    return base64.b64encode(_mixed(hashes)[:MAX_HASHES].astype("<u8").tobytes()).decode()


def num_trained(evaluated: np.ndarray, train: np.ndarray, trained: str) -> int:
    """Return the number of contents in a sketch that are evaluated, and are not in the present train split.

    Contents that data have in two splits are thus not counted; those that another split has moved are.

    Args:
        evaluated: hashes of the evaluated contents.
        train: hashes of the contents of the train split of the same data.
        trained: sketch of the contents that the run was trained on.
    """
    seen = np.frombuffer(base64.b64decode(trained), "<u8")
    return len(np.setdiff1d(np.intersect1d(seen, _mixed(evaluated)), _mixed(train)))
