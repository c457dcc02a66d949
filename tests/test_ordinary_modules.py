"""LightningModules as tutorials write them run under `bigmodel fit`, and `bigmodel.fit`."""

import copy
import csv
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tutorial_modules
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything

import bigmodel
from bigmodel.cli import main
from bigmodel.data.sampling import Permutation

STEPS = {"max_epochs": 3, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 2}
PAIRS = [
    ("LitMNIST", "DigitsData"),
    ("OwnLoaders", None),
    ("GAN", "DigitsData"),
    ("LitMNIST", "StreamData"),
    ("ListBatches", None),
    ("StepLRByEpoch", None),
    ("OneEpochEach", "DigitsData"),
]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a verb on a YAML file that only names a module and its data; returns the newest run directory and the output."""
    monkeypatch.chdir(tmp_path)

    def run(verb, module, data=None, *flags):
        config = {"model": f"tutorial_modules.{module}", "trainer": STEPS}
        config |= {"data": f"tutorial_modules.{data}"} if data else {}
        (tmp_path / "tutorial.yaml").write_text(yaml.safe_dump(config))
        main([verb, "-c", "tutorial.yaml", *flags])
        directories = sorted(tmp_path.glob("runs/tutorial/*"), key=lambda path: path.stat().st_ctime)
        return directories[-1] if directories else None, capsys.readouterr().out

    return run


def rows(directory):
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def load(directory, checkpoint="last"):
    return bigmodel.load(directory, checkpoint, trust=["tutorial_modules"])


@pytest.mark.parametrize(("module", "data"), PAIRS)
def test_a_yaml_file_names_the_module(module, data, command):
    directory, printed = command("fit", module, data)
    record = json.loads((directory / "run.json").read_text())
    assert (record["status"], record["step"]) == ("finished", 12), "three epochs of four batches"
    assert "resumed run sees other samples" in printed, "what it does not get"
    assert [path.name for path in directory.glob("checkpoints/last*")] == ["last-12.ckpt"]
    content = torch.load(directory / "checkpoints/last-12.ckpt", weights_only=True)["state_dict"]
    loaded = load(directory).state_dict()
    assert loaded.keys() == content.keys()
    assert all(torch.equal(loaded[name], content[name]) for name in content)
    written = rows(directory)
    assert max(int(row["step"]) for row in written) == 12
    measured = [row["step"] for row in written if row.get("train/lr")]
    assert measured == ["2", "4", "6", "8", "10", "12"]
    assert {int(row["seen/samples"]) // 16 == int(row["step"]) for row in written} == {True}


@pytest.mark.parametrize(("module", "data"), [PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[6]])
def test_check(module, data, command):
    directory, printed = command("check", module, data)
    assert directory is None
    assert "FAIL" not in printed
    assert "checkpoint" in printed


def test_a_metric_is_logged_once(command):
    directory, printed = command("fit", *PAIRS[0], "--callbacks.progress.every_n_seconds", "0")
    logged = [row["step"] for row in rows(directory) if row.get("train/loss")]
    assert logged == ["2", "4", "6", "8", "10", "12"]
    assert re.search(r"step 4  val_loss [\d.]+  val_acc [\d.]+$", printed, re.MULTILINE)


def test_the_best_checkpoint_without_val_loss(command):
    directory, printed = command("fit", *PAIRS[0])
    assert "selected by val_loss" in printed
    best = json.loads((directory / "run.json").read_text())["best"]
    losses = [float(row["val_loss"]) for row in rows(directory) if row.get("val_loss")]
    assert best["metric"] == "val_loss"
    assert best["value"] == pytest.approx(min(losses))
    directory, printed = command("fit", *PAIRS[6])
    assert "the latest checkpoint, because the module does not log val/loss" in printed
    assert (directory / "checkpoints" / "best-12.ckpt").exists()


def test_manual_optimization_is_clipped(command):
    directory, _ = command("fit", *PAIRS[2], "--trainer.gradient_clip_val", "1e-9")
    seed_everything(0)
    start = tutorial_modules.GAN().state_dict()
    torch.testing.assert_close(load(directory).state_dict(), start, rtol=0, atol=1e-7)
    directory, printed = command("fit", *PAIRS[2], "--callbacks.progress.every_n_seconds", "0")
    assert not torch.allclose(load(directory).generator.weight, start["generator.weight"], atol=1e-3)
    assert re.search(r"step 2 of 12.*g_loss [\d.]+  d_loss", printed)
    assert "self.logger.experiment records nothing" in printed


@pytest.mark.parametrize(("module", "data"), [PAIRS[0], PAIRS[2]])
def test_resume_continues_the_steps(module, data, command, capsys):
    directory, _ = command("fit", module, data)
    main(["fit", "--resume", str(directory), "--trust", "tutorial_modules", "--trainer.max_epochs", "5"])
    assert json.loads((directory / "run.json").read_text())["step"] == 20
    assert [row["step"] for row in rows(directory) if row.get("train/lr")] == [str(step) for step in range(2, 21, 2)]


def test_fit_in_python_is_the_command(command, capsys):
    directory, _ = command("fit", *PAIRS[0])
    ends = []

    class Mine(Callback):
        def on_train_end(self, trainer, pl_module):
            ends.append(trainer.global_step)

    seed_everything(0)
    task = tutorial_modules.LitMNIST()
    run = bigmodel.fit(
        task,
        tutorial_modules.DigitsData(),
        experiment="notebook",
        trainer=STEPS,
        callbacks={"mine": Mine(), "progress": None},
    )
    assert run.task is task
    assert not task.training
    assert ends == [12]
    assert run.directory.parent.name == "notebook"
    assert (run.best.name[:5], run.last.name) == ("best-", "last-12.ckpt")
    same = load(directory).state_dict()
    assert all(torch.equal(same[name], value) for name, value in task.state_dict().items())
    assert all(torch.equal(same[name], value) for name, value in load(run.directory).state_dict().items())
    assert run.metrics["val_loss"] == pytest.approx(float([row["val_loss"] for row in rows(directory)][-1]))
    with pytest.raises(ValueError, match="max_epoch"):
        bigmodel.fit(task, trainer={"max_epoch": 3})
    with pytest.raises(ValueError, match=r"bigmodel\.fit\(Task\(\), Data\(\)\)"):
        bigmodel.fit(tutorial_modules.LitMNIST)
    assert len(list(run.directory.parent.parent.glob("*/*"))) == 2, "nothing is left of what was refused"


def test_the_record_names_the_plugin(command):
    directory, _ = command("fit", *PAIRS[0])
    (plugin,) = json.loads((directory / "run.json").read_text())["sessions"][0]["plugins"].items()
    assert plugin[0] == "tutorial_modules"
    assert plugin[1]["git"] is None or re.match(r"[0-9a-f]{40}", plugin[1]["git"])


PAGE = Path(bigmodel.__file__).parent / "tasks" / "LIGHTNING.md"


def test_the_page(tmp_path, monkeypatch):
    blocks = dict(
        re.findall(r"^```(?:python|yaml)\n# (blobs\.\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    )
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    cpu = ["--trainer.accelerator", "cpu"]
    main(["fit", "-c", "blobs.yaml", "--model.learning_rate", "0.05", *cpu])
    (use,) = re.findall(r"^```python\n(import bigmodel\n.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    done = {}
    exec(use.replace('"max_epochs": 2', '"max_epochs": 2, "accelerator": "cpu"'), done)
    assert done["run"].metrics["val_loss"] < 1.3
    assert type(done["best"]) is type(done["run"].task)


TEMPLATE = Path(bigmodel.__file__).parent / "cli" / "template"


@pytest.fixture
def template(monkeypatch):
    monkeypatch.syspath_prepend(TEMPLATE)
    yield importlib.import_module("my_task.data"), importlib.import_module("my_task.module")
    for name in [name for name in sys.modules if name.split(".")[0] == "my_task"]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore:.*`val_dataloader`")
def test_the_template_is_right_under_a_bare_trainer(template, tmp_path):
    data, module = template
    data = data.MyTaskData(["asyncio", "email"], length=128, batch_size=8)
    task = module.MyTask(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    seed_everything(0)
    trainer = Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, default_root_dir=tmp_path, **quiet)
    data.setup("fit")
    task.net = module.NGrams(2)
    start = copy.deepcopy(task.net)
    trainer.fit(task, datamodule=data)
    first = [data.train[i] for i in Permutation(len(data.train), 0, 0)(np.arange(8))]
    loss = torch.nn.functional.cross_entropy(
        start(torch.stack([chunk.text for chunk in first])), torch.stack([chunk.target for chunk in first])
    )
    loss.backward()
    torch.testing.assert_close(task.net.head.weight, start.head.weight - start.head.weight.grad)


def test_the_order_of_the_template_follows_the_seed(template, monkeypatch):
    data = template[0].MyTaskData(["asyncio"], length=128, batch_size=8)
    data.setup("fit")
    orders = []
    for seed in ("", "0", "1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        orders.append(next(iter(data.train_dataloader())).index.tolist())
    assert orders[0] == orders[1] != orders[2]
