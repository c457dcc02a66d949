"""A folder of small coloured images in three classes that are easy to tell apart."""

import numpy as np
import pytest
from PIL import Image

CLASSES = {"cool": (40, 60, 200), "leafy": (50, 180, 60), "warm": (210, 70, 40)}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """96 PNG files of 12 x 10 pixels: 24, 32 and 40 a class."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    draw = np.random.default_rng(0)
    for number, (name, color) in enumerate(CLASSES.items()):
        (folder / name).mkdir(parents=True)
        for i in range(24 + 8 * number):
            noise = draw.normal(0, 60, (10, 12, 3))
            pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return folder
