"""Shared code of the benchmarks: sizes, flags, text, images, and the clock. Importing it is quick.

A *way* is a command that does the work of a row in its own fashion. It prints its figure as one line, {"figure": 123.4}.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import select
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BENCH = Path(".bench")  # commands run in the root of the repository; everything temporary is kept here
BIGMODEL = str(Path(sys.executable).with_name("bigmodel"))
TEXT, TOKENS = BENCH / "text.txt", BENCH / "tokens.npy"
VOCAB_SIZE = 65  # 64 characters and end-of-text, as large as that of the usual character-level Shakespeare
NUM_CHARACTERS = 4_000_000
# Of all ways alike; run.py sets it to what is faster on this machine.
PRECISION = os.environ.get("BENCH_PRECISION", "bf16-mixed")
BF16 = PRECISION == "bf16-mixed"


class Size(NamedTuple):
    """A GPT and its batch; context_length in tokens, batch_size in sequences per optimizer step."""

    depth: int
    num_heads: int
    width: int
    context_length: int
    batch_size: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in an optimizer step."""
        return self.batch_size * self.context_length


SIZES = {
    "large": Size(6, 6, 384, 256, 16),
    "small": Size(4, 4, 128, 64, 12),
    "deep": Size(12, 8, 512, 64, 4),  # 38 M parameters
}


class ImageSize(NamedTuple):
    """A ResNet, the images it reads and its batch."""

    depth: int
    widths: list[int]
    pixels: int
    channels: int
    batch_size: int


IMAGE_SIZES = {
    "resnet_small": ImageSize(14, [16, 32, 64], 28, 1, 64),
    "resnet18": ImageSize(18, [64, 128, 256, 512], 32, 3, 64),
}


def arguments(description: str | None) -> argparse.Namespace:
    """The flags that every way takes."""
    parser = argparse.ArgumentParser(description=description)
    sizes = [*SIZES, *IMAGE_SIZES]
    parser.add_argument("--size", choices=sizes, default="small", help="of the net, where there is a choice")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in all")
    parser.add_argument("--warmup", type=int, default=20, help="of these, steps before the clock starts")
    parser.add_argument("--losses", action="store_true", help="float32, and the loss of each step instead of the speed")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 where the way is of several processes, for DDP")
    return parser.parse_args()


def write_text() -> None:
    """Characters of the standard library's source, the 64 most frequent ones: as text for bigmodel, as ids for others."""
    if TOKENS.exists():
        return
    sources = (path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    text = "".join(sources)[:NUM_CHARACTERS]
    kept = sorted(character for character, _ in Counter(text).most_common(VOCAB_SIZE - 1))
    text = "".join(filter(set(kept).__contains__, text))
    BENCH.mkdir(exist_ok=True)
    TEXT.write_text(text)
    ids = {character: i for i, character in enumerate(kept)}
    np.save(TOKENS, np.array([ids[character] for character in text], np.uint16))


def digits(size: ImageSize) -> tuple[Any, Any]:
    """The images [N, C, S, S] uint8 in channels_last order and labels [N] that bigmodel prepared, as tensors in memory."""
    import torch

    from bigmodel.tasks.image_classification import ImageData, ImageSplit

    data = ImageData(
        "{mnist5k}", size.pixels, channels=size.channels, split=ImageSplit(0.1, 0.2), cache_dir=str(BENCH / "cache")
    )
    data.prepare_data()
    data.setup()
    images = data.images("train")
    pixels = torch.from_numpy(images.read(range(len(images))))  # [N, S, S, C]
    return pixels.permute(0, 3, 1, 2), torch.from_numpy(images.labels)


class Clock:
    """Wall-clock time between optimizer steps, all of it: data, logging and whatever else lies between them."""

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.warmup, self.done = steps, warmup, 0

    def tick(self) -> None:
        """To be called once after each optimizer step."""
        self.done += 1
        if self.done == self.warmup:
            self._start = time.perf_counter()
        elif self.done == self.steps:
            self._seconds = time.perf_counter() - self._start

    def report(self, per_step: int | None = None) -> None:
        """Print how many of what a step takes `per_step` of (tokens, images) were taken in a second; without it, the
        milliseconds of a step."""
        seconds = self._seconds / (self.steps - self.warmup)
        report(per_step / seconds if per_step else 1e3 * seconds)


def report(figure: Any) -> None:
    """Print what a way is there to find out."""
    print(f'\n{{"figure": {json.dumps(figure)}}}', flush=True)


def fit_gpt(size: str, steps: int, more: str = "") -> list[str]:
    """The command that trains gpt.yaml at a size, as a person would type it."""
    s = SIZES[size]
    flags = (
        f"--experiment bench-{size} --trainer.max_steps {steps} --trainer.precision {PRECISION}"
        f" --model.net.depth {s.depth} --model.net.num_heads {s.num_heads} --model.net.width {s.width}"
        f" --data.context_length {s.context_length} --data.batch_size {s.batch_size} {more}"
    )
    return [BIGMODEL, "fit", "-c", "scripts/bench/gpt.yaml", *flags.split()]


def environment() -> dict[str, str]:
    """For commands that find this package, and bigmodel as it is here. Memory comes in huge pages where there are any:
    without them a process is up to 20 % faster or slower from its start to its end, by where its pages happen to lie."""
    pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return {**os.environ, **pages, "PYTHONPATH": f".{os.pathsep}scripts", "COLUMNS": "120", "LINES": "40"}


def run_in_terminal(command: list[str]) -> str:
    """Return the output of a command on its own terminal, because progress bars are part of the measurement.

    Raises:
        RuntimeError: if it fails, with the end of what it printed.
    """
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, env=environment())
    os.close(terminal)
    output = b""
    try:
        while process.poll() is None or select.select([controller], [], [], 0)[0]:
            if select.select([controller], [], [], 0.2)[0]:
                output += os.read(controller, 1 << 16)
    except OSError:  # how a terminal says that nobody holds it any more
        process.wait()
    finally:
        process.kill()
        os.close(controller)
    text = output.decode(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    return text


def last_figure(output: str, pattern: str = r'\{"figure": (.*)\}') -> Any:
    """The figure that a way printed."""
    return json.loads(re.findall(pattern, output)[-1])
