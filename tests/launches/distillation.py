"""Distillation on two processes: `python forked.py 2 distillation.py`, in a folder with `teacher-run` and `school`.

Run by tasks/distillation/test_module.py, which distills alone with the same words.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from bigmodel.cli import main
from bigmodel.training.callbacks import TrainingLog
from bigmodel.training.callbacks.gradient_scaling import get_callback
from bigmodel.training.callbacks.training_log import outside_mfu

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "image_classification" / "digits.yaml"
OURS = "bigmodel.tasks.distillation"
IMAGES = "bigmodel.tasks.image_classification"
MLP = "bigmodel.nn.MLP"
QUICK = {
    "data.cache_dir": "cache", "data.num_workers": 0, "data.augment": "[]", "data.batch_size": 32,
    "trainer.max_epochs": "null", "trainer.max_steps": 12, "trainer.accelerator": "cpu", "trainer.val_check_interval": 6,
    "trainer.check_val_every_n_epoch": "null", "trainer.log_every_n_steps": 1, "callbacks.progress": "null",
    "callbacks.last.every_n_steps": 6, "callbacks.last.every_n_minutes": "null", "callbacks.last.save_top_k": -1,
    "callbacks.report": "bigmodel.evaluation.Report", "callbacks.report.num_mistakes": 1,  # drawing takes long
}  # fmt: skip
STUDENT = {"net": MLP, "net.widths": "[8]", "optimizer": "torch.optim.SGD", "optimizer.lr": 0.05, "schedule": "null"}


def words(settings):
    return ["fit", "-c", str(EXPERIMENT), *(f"--{key}={value}" for key, value in settings.items())]


def teaching(runs_dir, **settings):
    """Words for training a net of digits that is to teach."""
    net = {} if "model.net" in settings else {"model.net": MLP, "model.net.widths": "[32]"}
    return words(
        {**QUICK, "trainer.max_steps": 60, "model.optimizer.lr": 0.01, "runs_dir": runs_dir, **net, **settings}
    )


def distilling(runs_dir, teacher="teacher-run", student=STUDENT, more=None, **settings):
    """Words for a distillation; `settings` of the module, with __ for a dot; `more` of anything."""
    model = {
        "model": f"{OURS}.Distillation",
        "model.teacher": teacher,
        "model.student": f"{IMAGES}.ImageClassification",
    }
    model |= {f"model.student.{key}": value for key, value in student.items()}
    model |= {f"model.{key.replace('__', '.')}": value for key, value in settings.items()}
    return words({**QUICK, **model, "runs_dir": runs_dir, **(more or {})})


CACHE = {"cache": f"{OURS}.TeacherCache", "cache__dtype": "float32"}
WITNESS = {"callbacks.witness": "distillation.Witness"}


LM = "bigmodel.tasks.language_modeling"
TEXT = {
    "data": f"{LM}.TextData", "data.path": "text", "data.cache_dir": "cache", "data.num_processes": 1,
    "data.tokenizer": f"{LM}.BPE", "data.tokenizer.vocab_size": 300, "data.split": f"{LM}.DocumentHashSplit",
    "data.split.val": 0.2, "data.context_length": 16, "data.batch_size": 8, "callbacks.progress": "null",
    "callbacks.last.every_n_steps": 3, "callbacks.last.every_n_minutes": "null", "callbacks.last.save_top_k": -1,
}  # fmt: skip
ON_POLICY = {
    "model": f"{OURS}.Distillation", "model__teacher": "teacher-run", "model__on_policy": f"{OURS}.OnPolicy",
    "model__on_policy__max_new_tokens": 10, "model__losses__jsd": f"{OURS}.GeneralizedJSD",
}  # fmt: skip


def write_texts():
    """Forty short texts of seven words, in `text`."""
    words = ["teachers", "students", "books", "letters", "numbers", "questions", "answers"]
    Path("text").mkdir()
    for number in range(40):
        text = " ".join(words[(number + i * (1 + number % 3)) % 7] for i in range(12 + number))
        Path("text", f"{number}.txt").write_text(f"{number}. {text}.")


def of_text(runs_dir, task="model", width=16, **settings):
    """Words for training a language model in a folder with `text`; `task` is the setting that it stands under."""
    net = {"net": "bigmodel.nn.GPT", "net.width": width, "net.depth": 1, "net.num_heads": 2, "net.positions": "rotary"}
    net |= {"net.dropout": 0.1, "optimizer": "torch.optim.AdamW", "optimizer.lr": 0.01}
    net = {f"{task}.{key}": value for key, value in net.items()}
    given = {key.replace("__", "."): value for key, value in settings.items()}
    data = {key: value for key, value in TEXT.items() if "vocab_size" not in key or "data__tokenizer" not in settings}
    every = {**data, "runs_dir": runs_dir, "model": f"{LM}.LanguageModeling", task: f"{LM}.LanguageModeling"}
    return ["fit", "-c", "empty.yaml", *(f"--{key}={value}" for key, value in {**every, **net, **given}.items())]


def on_policy(runs_dir, **settings):
    """Words for a student without dropout that writes half of its batches, and compares a layer."""
    hint = {"hint": f"{OURS}.Hint", "hint__student": "blocks.0", "hint__teacher": "blocks.0"}
    terms = {f"model__losses__{key}": value for key, value in hint.items()}
    return of_text(runs_dir, "model.student", model__student__net__dropout=0, **ON_POLICY, **terms, **settings)


class Witness(Callback):
    """Sees to it that a step's loss is that of a plain loop, and that nothing happens to the teacher."""

    losses: list[float] = []  # noqa: RUF012  # of the last run's steps

    def on_train_start(self, trainer, pl_module):
        self.losses.clear()
        self.teachers = torch.nn.ModuleList(pl_module.teacher_outputs.teachers.tasks)
        self.before = {name: tensor.clone() for name, tensor in self.teachers.state_dict().items()}
        trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert trained == {id(p) for p in pl_module.parameters()}
        assert not trained & {id(p) for p in self.teachers.parameters()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pixels = batch.images.float() / 255
        with torch.no_grad(), outside_mfu():  # each model by its own mean and deviation
            student = pl_module.net((pixels - pl_module.mean) / pl_module.std)
            said = [teacher.net((pixels - teacher.mean) / teacher.std) for teacher in self.teachers]
        taught = torch.stack([(logits / 4).softmax(1) for logits in said]).mean(0)
        soft = F.kl_div((student / 4).log_softmax(1), taught, reduction="sum")
        self.expected = 0.1 * F.cross_entropy(student, batch.targets, reduction="sum") + 0.9 * 16 * soft

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.testing.assert_close(outputs["loss"], self.expected, rtol=1e-5, atol=1e-5)
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer, pl_module):
        assert not any(module.training for teacher in self.teachers for module in teacher.modules())
        assert all(p.grad is None and not p.requires_grad for p in self.teachers.parameters())
        after = self.teachers.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in self.before.items())
        weights = [p.numel() for p in pl_module.net.parameters() if p.ndim == 2]
        passes = [2 * weights[0], *(3 * n for n in weights[1:])]  # nobody needs the gradient of the pixels
        assert get_callback(trainer, TrainingLog)._flops == 2 * 32 * sum(passes), "the student's alone"


if __name__ == "__main__":
    torch.set_num_threads(1)
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.micro_batch_size": 8}
    main(distilling("two", more=two))
    main(distilling("two-cached", more=two, **CACHE, cache__folder="kept-by-two"))
    os.chdir("school")
    for name, strategy in (("two", "ddp"), ("sharded", "bigmodel.parallel.ShardedStrategy")):
        main(on_policy(name, trainer__devices=2, trainer__strategy=strategy))
