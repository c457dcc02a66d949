"""Runs of sharded nets on four processes: `python forked.py 4 sharded.py TABLE SINGLE DIGITS`.

Run by test_sharded.py in an empty folder, where SINGLE is the directory of a stopped run of one process, and
DIGITS a folder of images.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import bigmodel.training.precision
from bigmodel.cli import main
from bigmodel.nn import GPT, ViT
from bigmodel.parallel.tensor_parallel import tensor_parallel

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
REDUCE = (
    "reduce_scatter_single" if hasattr(distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
)  # FSDP2's
MIXED = ("--trainer.precision", "bf16-mixed", "--trainer.max_steps", 2, "--trainer.limit_val_batches", 0)
SHARDED = ("--trainer.devices", "4", "--trainer.strategy", "bigmodel.parallel.ShardedStrategy")


class Look(Callback):
    """Writes the initial weights, the first process's shards of them, and the number of gradient reductions."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        parameters = dict(pl_module.named_parameters())
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values())
        self.seen = {"share": held / sum(p.numel() for p in parameters.values()), "reduced": 0}
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        if trainer.is_global_zero:
            self.folder.mkdir()
            torch.save({name: p.detach().clone() for name, p in whole.items()}, self.folder / "initial.pt")
        self.reduce = getattr(distributed, REDUCE)

        def counted(*args, **kwargs):
            self.seen["reduced"] += 1
            return self.reduce(*args, **kwargs)

        setattr(distributed, REDUCE, counted)

    def on_train_end(self, trainer, pl_module):
        setattr(distributed, REDUCE, self.reduce)
        if trainer.is_global_zero:
            (self.folder / "seen.json").write_text(json.dumps(self.seen))


def text(name: str, *flags: object) -> list[str]:
    """Arguments of `bigmodel fit` with a small GPT: 4 steps of sixteen sequences, clipped, averaged, validated after two."""
    settings = {
        "model.net.width": 32, "model.net.depth": 2, "model.net.num_heads": 4, "model.net.num_kv_heads": 2,
        "model.net.activation": "swiglu", "model.net.norm": "rms", "model.net.qk_norm": True, "model.net.tied_head": False,
        "model.optimizer": "torch.optim.SGD", "model.optimizer.lr": 0.5, "model.optimizer.momentum": 0.9,
        "model.loss_chunk_size": 100, "data.path": "text.txt", "data.tokenizer.vocab_size": 270,
        "data.split": "bigmodel.tasks.language_modeling.ContiguousSplit", "data.split.val": 0.2,
        "data.exclude": "null", "data.cache_dir": "cache", "data.context_length": 32, "data.batch_size": 16,
        "data.micro_batch_size": 2, "trainer.accelerator": "cpu", "trainer.precision": "32-true", "trainer.max_steps": 4,
        "trainer.max_epochs": "null", "trainer.val_check_interval": 2, "trainer.limit_val_batches": 1.0,
        "trainer.log_every_n_steps": 1, "trainer.gradient_clip_val": 0.3, "callbacks.samples.prompts": "[The ]",
        "callbacks.samples.options": "{max_new_tokens: 4, temperature: 0}",
        "callbacks.ema": "bigmodel.training.callbacks.EMA",
        "callbacks.ema.decay": 0.8, "callbacks.last.every_n_steps": 2, "callbacks.last.every_n_minutes": "null",
        "callbacks.last.save_top_k": -1, "callbacks.look": "sharded.Look", "callbacks.look.folder": f"seen-{name}",
        "runs_dir": name, "wandb.mode": "disabled",
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    return [str(part) for part in ("-c", EXPERIMENTS / "language_modeling" / "stdlib.yaml", *arguments, *flags)]


def images(name: str, digits: object, *flags: object) -> list[str]:
    """Arguments of `bigmodel fit` on digits with a ResNet, which has BatchNorm, two steps."""
    settings = {
        "model.net": "bigmodel.nn.ResNet", "model.net.blocks": "[1, 1]", "model.net.widths": "[16, 32]",
        "data.path": digits, "data.cache_dir": "cache", "data.batch_size": 32, "trainer.accelerator": "cpu",
        "trainer.max_epochs": "null", "trainer.max_steps": 2, "trainer.val_check_interval": 2,
        "trainer.check_val_every_n_epoch": "null", "callbacks.report": "null", "runs_dir": name,
        "wandb.mode": "disabled",
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    return [str(part) for part in ("-c", EXPERIMENTS / "image_classification" / "digits.yaml", *arguments, *flags)]


def choices(name: str, task: str, *flags: object) -> list[str]:
    """Arguments of `bigmodel fit` on a recommender with an item table, four steps of 32 samples, ranking all items twice."""
    where = "bigmodel.tasks.recommendation"
    settings = {
        "model": f"{where}.{task}", "model.net.width": 16, "model.loss": f"{where}.SampledSoftmax",
        "model.loss.num_negatives": 8, "model.optimizer": "torch.optim.SGD", "model.optimizer.lr": 0.5,
        "model.topk": "[5]", "data": f"{where}.InteractionData", "data.path": "events.csv", "data.max_length": 8,
        "data.batch_size": 32, "data.micro_batch_size": 4, "data.cache_dir": "cache", "trainer.accelerator": "cpu",
        "trainer.max_epochs": "null", "trainer.max_steps": 4, "trainer.val_check_interval": 2,
        "trainer.check_val_every_n_epoch": "null", "callbacks.best.monitor": "val/ndcg@5", "callbacks.best.mode": "max",
        "callbacks.last.every_n_minutes": "null", "runs_dir": name, "wandb.mode": "disabled",
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", value)]
    return [str(part) for part in ("-c", "events.yaml", *arguments, *flags)]


def strategy(**options: object) -> list[str]:
    return [*SHARDED, *(str(w) for key, value in options.items() for w in (f"--trainer.strategy.{key}", value))]


def only_run(runs_dir: str) -> Path:
    (record,) = Path(runs_dir).glob("**/run.json")
    return record.parent


def stop_at(directory: Path, step: int) -> None:
    for path in (directory / "checkpoints").iterdir():
        if int(path.stem.rpartition("-")[2]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def copy_stopped(source: Path, target: Path, step: int) -> None:
    """Copy a run, and cut the copy as if stopped at this step; done by the first process."""
    if os.environ["RANK"] == "0":
        shutil.copytree(source, target)
        stop_at(target, step)
    distributed.barrier()


def refused(arguments: list[str]) -> str:
    """Return the error message of the command."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        main(["fit", *arguments])
        raise AssertionError(f"not refused: {arguments}")
    return errors.getvalue()


def error_of(words: list[str]) -> str:
    try:
        main(["fit", *words])
    except RuntimeError as error:
        return str(error)
    raise AssertionError(f"not refused: {words}")


def refused_net(net: torch.nn.Module, **options: bool) -> str:
    try:
        tensor_parallel(net, init_device_mesh("cpu", (4,)), **options)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"not refused: {net}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    table, single, digits = sys.argv[1:]
    main(["fit", *text("fsdp", *strategy())])
    again = ("--callbacks.activation_checkpointing", "bigmodel.parallel.ActivationCheckpointing")
    hybrid = strategy(num_replicas=2, sharded_checkpoints=False, reduce_each_micro_batch=True)
    main(["fit", *text("hybrid", *hybrid, *again)])
    larger = ("--data.micro_batch_size", 4)  # for half as many that read: two micro-batches as well
    main(["fit", *text("tensor", *strategy(tensor_parallel_size=2), *larger)])
    sequence = strategy(tensor_parallel_size=2, sequence_parallel=True, cpu_offload=True)
    main(["fit", *text("sequence", *sequence, *again, *larger)])
    main(["fit", *text("mixed", *strategy(tensor_parallel_size=2), *larger, *MIXED)])
    main(["fit", "--resume", single, "--callbacks.look.folder", "seen-file-to-shards", *strategy()])
    copy_stopped(only_run("fsdp"), Path("shards-to-mesh"), 2)
    main(
        [
            "fit",
            "--resume",
            "shards-to-mesh",
            "--callbacks.look",
            "null",
            *strategy(tensor_parallel_size=2),
            *map(str, larger),
        ]
    )
    # Here the first process alone computes bf16 faster: it chooses for all.
    slow, bigmodel.training.precision.bf16_speed = (
        bigmodel.training.precision.bf16_speed,
        lambda _: 2.0 if os.environ["RANK"] == "0" else 0.1,
    )
    main(["fit", *images("images", digits, *strategy(), "--trainer.precision", "auto")])
    bigmodel.training.precision.bf16_speed = slow
    main(["fit", *choices("histories", "SequentialRecommendation", "--model.net.dropout", 0, *strategy())])
    main(["fit", *choices("pairs", "PairRecommendation", *strategy())])
    outsider = Path(__file__).parents[1] / "outsider" / "experiment.yaml"
    few = ["--data.path", table, "--data.batch_size", "12", "--trainer.accelerator", "cpu", "--trainer.max_steps", "3"]
    few += ["--wandb.mode", "disabled"]
    main(["fit", "-c", str(outsider), *few, "--runs_dir", "outsider", *strategy()])
    average = ("--callbacks.ema", "lightning.pytorch.callbacks.EMAWeightAveraging", "--runs_dir", "average")
    messages = {
        "average": error_of(["-c", str(outsider), *few, *average, *strategy()]),
        "replicas": refused(text("refused", *strategy(num_replicas=3))),
        "half": refused(text("refused", *strategy(), "--trainer.precision", "16-mixed")),
        "heads": refused_net(GPT(100, 8, width=12, num_heads=3, depth=1)),
        "own": refused_net(ViT(10, 1, 8, patch_size=4, width=32, depth=1, num_heads=4)),
        "dropout": refused_net(GPT(100, 8, width=32, num_heads=4, depth=1, dropout=0.1), sequence_parallel=True),
        "plan": refused_net(torch.nn.Sequential(torch.nn.Linear(4, 4))),
    }
    if os.environ["RANK"] == "0":
        Path("messages.json").write_text(json.dumps(messages))
