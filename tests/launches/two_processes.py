"""Runs on two processes, in one launch: `python forked.py 2 two_processes.py TABLE SINGLE DIGITS`.

Run by test_two_processes.py in an empty folder, where SINGLE is the directory of a stopped run of one process, and
DIGITS a folder of images.
"""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

from bigmodel.cli import main


class Recorder(Callback):
    """Writes the samples of each optimizer step on this process, as JSON lines."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer, pl_module):
        self.step, self.taken = trainer.global_step, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.taken += batch.index.tolist()
        if trainer.global_step > self.step:
            with open(f"{self.path}.{trainer.global_rank}", "a") as file:
                file.write(json.dumps({"step": trainer.global_step, "taken": self.taken}) + "\n")
            self.step, self.taken = trainer.global_step, []


def experiment(table: str, runs_dir: str, *flags: object) -> list[str]:
    """Arguments of `bigmodel fit` with the outsider's task: 10 steps of 12 rows over two epochs, validated in mid-epoch."""
    arguments = [
        "-c",
        Path(__file__).parents[1] / "outsider" / "experiment.yaml",
        "--data.path",
        table,
        "--data.batch_size",
        12,
    ]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "null", "--trainer.max_steps", 10]
    arguments += ["--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 1, "--runs_dir", runs_dir]
    arguments += [
        "--callbacks.last.every_n_steps",
        1,
        "--callbacks.last.every_n_minutes",
        "null",
        "--callbacks.last.save_top_k",
        -1,
    ]
    arguments += ["--callbacks.recorder", "two_processes.Recorder", "--callbacks.recorder.path", f"{runs_dir}.samples"]
    return [str(part) for part in (*arguments, *flags)]


def images(runs_dir: str, digits: object, *flags: object) -> list[str]:
    """Arguments of `bigmodel fit` on digits, ten steps of 32, augmented, mixed and weighted by class, validated twice."""
    arguments: list[object] = ["-c", Path(__file__).parents[2] / "experiments" / "image_classification" / "digits.yaml"]
    settings = {
        "model.net": "bigmodel.nn.ViT", "model.net.patch_size": 4, "model.net.width": 32, "model.net.depth": 1,
        "model.net.num_heads": 2, "data.mix": "bigmodel.tasks.image_classification.MixupCutMix", "data.mix.mixup_alpha": 0.5,
        "data.mix.cutmix_alpha": 0.5, "data.balance": "weights", "data.path": digits, "data.cache_dir": "cache",
        "data.batch_size": 32, "model.optimizer": "torch.optim.SGD", "model.optimizer.lr": 0.1, "trainer.accelerator": "cpu",
        "trainer.max_epochs": "null", "trainer.max_steps": 10, "runs_dir": runs_dir,
        "trainer.val_check_interval": 5, "trainer.check_val_every_n_epoch": "null", "trainer.log_every_n_steps": 1,
    }  # fmt: skip
    arguments += [part for key, value in settings.items() for part in (f"--{key}", value)]
    return [str(part) for part in (*arguments, *flags)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    table, single, digits = sys.argv[1:]
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    main(["fit", *experiment(table, "two", "--data.micro_batch_size", 3, *two)])
    main(
        [
            "fit",
            "--resume",
            single,
            "--data.micro_batch_size",
            "2",
            "--callbacks.recorder.path",
            "one-to-two.samples",
            *two,
        ]
    )
    main(["fit", *images("images-two", digits, "--data.micro_batch_size", 8, *two)])
    main(["check", *experiment(table, "checked", "--data.micro_batch_size", 3, *two)])
