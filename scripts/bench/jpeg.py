"""Reading a folder of JPEG files as 224 x 224 pixels: bigmodel's training loader, or Pillow in a bare loop.

    python -m bench.jpeg bigmodel|pillow [--width 500 --height 375] [--processes 2]

Both use the same number of processes, and cut a box of 8 to 100 % of the area out of each image. The bare loop opens,
converts, crops and resizes, and keeps nothing; bigmodel's loader also batches, and hands the batches over to the training
process. The images are enlarged noise at quality 90, 2,000 of them.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from bench.common import BENCH, report

SIDE, NUM_IMAGES = 224, 2000


def make_images(width: int, height: int) -> Path:
    """A folder of two classes, made once."""
    folder = BENCH / f"jpeg-{width}x{height}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        for number in range(NUM_IMAGES):
            noise = np.random.default_rng(number).integers(0, 256, (height // 12, width // 12, 3), np.uint8)
            path = partial / f"class{number % 2}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        partial.rename(folder)
    return folder


def read(path: Path) -> int:
    """Read images in a plain loop without a framework."""
    with Image.open(path) as image:
        width, height = image.size
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = min(width, round(math.sqrt(area * ratio))), min(height, round(math.sqrt(area / ratio)))
        left, top = random.randint(0, width - w), random.randint(0, height - h)
        box = (left, top, left + w, top + h)
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)).nbytes


def pillow(folder: Path, processes: int) -> float:
    """Images per second of the bare loop."""
    paths = sorted(folder.glob("*/*.jpg"))
    with Pool(processes) as pool:
        pool.map(read, paths[: 8 * processes])  # the processes are up
        start = time.perf_counter()
        pool.map(read, paths, chunksize=16)
        return len(paths) / (time.perf_counter() - start)


def bigmodel(folder: Path, processes: int) -> float:
    """Images per second of a second epoch of the training loader: random crops, decoded as they are read."""
    from bigmodel.tasks.image_classification import ImageData, ImageSplit, RandomResizedCrop

    data = ImageData(
        str(folder), SIDE, crop=RandomResizedCrop(), split=ImageSplit(0.0), cache_decoded=False, num_workers=processes,
        cache_dir=str(BENCH / "cache"),
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    for _ in loader:  # the processes are up, the files in the system's cache
        pass
    count, start = 0, time.perf_counter()
    for batch in loader:
        count += len(batch.index)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["bigmodel", "pillow"])
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    folder = make_images(options.width, options.height)
    report({"bigmodel": bigmodel, "pillow": pillow}[options.way](folder, options.processes))


if __name__ == "__main__":
    main()
