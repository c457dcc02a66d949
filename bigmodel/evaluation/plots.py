"""Figures of a classifier's errors: its confusion matrix, and a sheet of misclassified images.

K classes, H and W pixels, C channels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

_MAX_WRITTEN = 20  # maximum number of classes for counts in the cells
_MAX_NAMED = 40  # maximum number of classes for names at the axes
_COLUMNS = 8  # of a sheet


@dataclass(frozen=True)
class Mistake:
    """Misclassified image.

    Attributes:
        image: [H, W, C] uint8, C 1 or 3.
        true: the name of its class.
        predicted: the name of the predicted class.
        probability: of the predicted class, 0 to 1.
        name: identifies the image, such as its path.
    """

    image: np.ndarray
    true: str
    predicted: str
    probability: float
    name: str


def draw_confusion(matrix: np.ndarray, classes: Sequence[str], path: Path, unit: str = "images") -> None:
    """Draw a confusion matrix as PNG, each row coloured by its fractions.

    Counts are written for few classes, and names for somewhat more.

    Args:
        matrix: [K, K] counts, rows true and columns predicted.
        classes: K names.
        path: the file; replaced if it exists.
        unit: name of the classified samples.
    """
    num_classes = len(classes)
    assert matrix.shape == (num_classes, num_classes), (matrix.shape, num_classes)
    shares = matrix / matrix.sum(axis=1, keepdims=True).clip(min=1)
    written, named = num_classes <= _MAX_WRITTEN, num_classes <= _MAX_NAMED
    cell = 0.5 if written else 0.26  # inches
    side = max(3.5, cell * num_classes) if named else 7.5
    labels = [_short(name) for name in classes]
    margin = 0.08 * max(map(len, labels)) if named else 0.2
    figure = Figure(figsize=(side + margin + 1.5, side + margin + 0.9), layout="constrained")
    axes = figure.add_subplot()
    # By the square root of the fraction if there are no counts: otherwise only the diagonal is visible.
    scale = PowerNorm(1.0 if written else 0.5, vmin=0, vmax=1)
    drawn = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
    total = int(matrix.sum())
    axes.set_title(f"accuracy {matrix.trace() / max(total, 1):.2%} of {total:,} {unit}", fontsize=12, pad=12)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if named:
        rotation = 0 if margin < side / num_classes else 90
        axes.set_xticks(range(num_classes), labels, rotation=rotation, fontsize=9, parse_math=False)
        axes.set_yticks(range(num_classes), labels, fontsize=9, parse_math=False)
    axes.tick_params(length=0 if named else 3)
    if written:
        _write_counts(axes, matrix, shares)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    _save(figure, path)


def _write_counts(axes: Axes, matrix: np.ndarray, shares: np.ndarray) -> None:
    longest = len(str(matrix.max()))
    for row, column in zip(*matrix.nonzero(), strict=True):
        axes.text(
            column,
            row,
            str(matrix[row, column]),
            ha="center",
            va="center",
            fontsize=min(9.0, 36 / longest),  # fits the cell
            color="white" if shares[row, column] > 0.5 else "black",
        )


def draw_mistakes(mistakes: Sequence[Mistake], path: Path) -> None:
    """Draw images in a grid as PNG, each with its true class, the predicted one and its probability.

    Args:
        mistakes: in the order of drawing, at least one.
        path: the file; replaced if it exists.
    """
    assert mistakes
    columns = min(_COLUMNS, len(mistakes))
    rows = math.ceil(len(mistakes) / columns)
    side, text, heading = 1.5, 0.65, 0.35  # inches
    height = rows * (side + text) + heading
    figure = Figure(figsize=(1.1 * side * columns, height))
    figure.suptitle("true class, and in red what it was taken for and how surely", fontsize=9, y=1 - 0.1 / height)
    places = {"left": 0, "right": 1, "top": 1 - heading / height, "bottom": text / height}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**places, "wspace": 0.1, "hspace": text / side})
    grid = grid.ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, mistake in zip(grid, mistakes, strict=False):
        _draw_mistake(axes, mistake)
    _save(figure, path)


def _draw_mistake(axes: Axes, mistake: Mistake) -> None:
    height, width, channels = mistake.image.shape
    # Pixels of a small image stay visible: smoothing would hide the net's input.
    smoothing = "nearest" if max(height, width) <= 128 else "antialiased"
    pixels = mistake.image[..., 0] if channels == 1 else mistake.image
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation=smoothing)
    for line, text, size, color in (
        (0, _short(mistake.true, 22), 8, "black"),
        (1, f"{_short(mistake.predicted, 17)}  {mistake.probability:.0%}", 8, "firebrick"),
        (2, _short(Path(mistake.name).name, 28), 6, "0.5"),
    ):
        below = (0, -3 - 11 * line)  # points from the middle of the image's lower edge
        axes.annotate(
            text, (0.5, 0), below, "axes fraction", "offset points",
            ha="center", va="top", fontsize=size, color=color, parse_math=False,
        )  # fmt: skip


def _short(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _save(figure: Figure, path: Path) -> None:
    """Write the PNG to a temporary name and rename it: a reader never sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # glyph of a name; drawn as a box
            figure.savefig(partial, format="png", dpi=150, bbox_inches="tight", pad_inches=0.1)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
