"""Training classifiers of images, teaching one, and reading files."""

from __future__ import annotations

import json
import os

from bench.common import BIGMODEL, IMAGE_SIZES, PRECISION
from bench.rows.row import PYTHON, Bound, Row


def images(quick: bool) -> list[Row]:
    """Image classification and distillation."""
    return [
        resnet("resnet_small", *((40, 20) if quick else (400, 60)), limits=(0.93, 1.3)),
        resnet("resnet18", *((14, 11) if quick else (41, 11)), limits=(0.98, 1.1)),
        Row(
            "mnist5k",
            "mnist5k.yaml, three seeds, each under two minutes: mean test accuracy",
            {"bigmodel": [*PYTHON, "bench.mnist5k"]},
            [Bound("bigmodel", None, "at least", 0.985)],
            once=True,
        ),
        distillation(*((40, 20) if quick else (300, 60))),
        jpeg(500, 375),
        jpeg(224, 224),
    ]


def resnet(name: str, steps: int, warmup: int, limits: tuple[float, float]) -> Row:
    """Training speed of a ResNet on decoded images, without augmentation."""
    s = IMAGE_SIZES[name]
    flags = ["--size", name, "--steps", str(steps), "--warmup", str(warmup)]
    fit = (
        f"fit -c scripts/bench/images.yaml --experiment bench-{name} --trainer.max_steps {steps}"
        f" --trainer.precision {PRECISION}"
        f" --model.net.depth {s.depth} --model.net.widths {json.dumps(s.widths, separators=(',', ':'))}"
        f" --data.size {s.pixels} --data.channels {s.channels} --data.batch_size {s.batch_size}"
        f" --callbacks.timer bench.callbacks.Timer --callbacks.timer.warmup {warmup}"
        f" --callbacks.timer.per_step {s.batch_size}"
    )
    return Row(
        name,
        f"ResNet-{s.depth} of widths {s.widths}, {s.pixels}x{s.pixels}x{s.channels}, batch {s.batch_size}, {PRECISION},"
        " channels_last: training, images/s",
        {
            "bigmodel fit": [BIGMODEL, *fit.split()],
            "plain loop": [*PYTHON, "bench.image_plain", *flags],
            "HF Trainer": [*PYTHON, "bench.image_trainer", *flags],
        },
        [
            Bound("bigmodel fit", over, "at least", limit)
            for over, limit in zip(("plain loop", "HF Trainer"), limits, strict=True)
        ],
        times=3 if name == "resnet_small" else 1,
    )


def distillation(steps: int, warmup: int) -> Row:
    """Cost of a cached and an online teacher in a step of a small ResNet."""
    ways = {"plain step": "plain", "teacher kept": "kept", "forward + step": "apart", "teacher asked": "asked"}
    command, flags = [*PYTHON, "bench.distillation"], ["--steps", str(steps), "--warmup", str(warmup)]
    return Row(
        "distillation",
        f"A small ResNet taught by one four times as wide, 28x28, batch 64, {PRECISION}: ms per optimizer step",
        {name: [*command, way, *flags] for name, way in ways.items()},
        [
            Bound("teacher kept", "plain step", "at most", 1.05),
            Bound("teacher asked", "forward + step", "at most", 1.05),
        ],
        times=3,
    )


def jpeg(width: int, height: int) -> Row:
    """Speed of reading a folder of JPEG files, over as many processes as there are cores."""
    command = [*PYTHON, "bench.jpeg"]
    flags = ["--width", str(width), "--height", str(height), "--processes", str(os.cpu_count() or 1)]
    return Row(
        f"jpeg{width}",
        f"Reading JPEG files of {width}x{height} as 224x224, {flags[-1]} processes: images/s",
        {"bigmodel": [*command, "bigmodel", *flags], "Pillow": [*command, "pillow", *flags]},
        [Bound("bigmodel", "Pillow", "at least", 0.9)],
    )
