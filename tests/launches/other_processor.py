"""Few steps of training, by which processors are compared: `python other_processor.py DIGITS OUTPUT.json`, in an empty
folder, where DIGITS is a folder of images.

Run by test_other_processor.py in a process that takes this processor for another one, and called there in its own.
"""

import csv
import json
import sys
from pathlib import Path

import torch

from bigmodel.cli import main
from bigmodel.nn import GPT
from bigmodel.training.precision import choose

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NET = ("--model.net", "bigmodel.nn.ResNet", "--model.net.blocks", "[1,1]", "--model.net.widths", "[32,64]")
RUNS = {  # a step with attention over patches, one with convolutions and BatchNorm, one with a causal language model
    "image": ("image_classification/check.yaml",),
    "convolution": ("image_classification/check.yaml", *NET),
    "language": ("language_modeling/check.yaml",),
}


def train(name: str, digits: object) -> list[float]:
    """The losses of three steps in float32, the folder `name` being made for the run."""
    experiment, *flags = RUNS[name]
    settings = {
        "trainer.max_steps": 3, "trainer.precision": "32-true", "trainer.accelerator": "cpu", "trainer.log_every_n_steps": 1,
        "trainer.limit_val_batches": 0, "data.cache_dir": "cache", "runs_dir": name, "callbacks.progress": "null",
    }  # fmt: skip
    if name != "language":
        settings["data.path"] = digits
    arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    main(["fit", "-c", str(EXPERIMENTS / experiment), *flags, *arguments])
    (metrics,) = Path(name).glob("**/metrics.csv")
    with open(metrics, newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    digits, output = sys.argv[1:]
    choice = choose(torch.device("cpu"), GPT(vocab_size=512, context_length=16, width=192, depth=1, num_heads=3))
    found = {
        "precision": choice.precision,
        "speed_of_bf16": choice.speed,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "losses": {name: train(name, digits) for name in RUNS},
    }
    Path(output).write_text(json.dumps(found))
