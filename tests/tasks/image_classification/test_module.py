"""Image classification as a task: trained, resumed, evaluated, asked; against plain loops and itself."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bigmodel
from bigmodel.cli import main
from bigmodel.run import checkpoint_step
from bigmodel.tasks.image_classification import ImageBatch, ImageClassification

TASK = "bigmodel.tasks.image_classification"
EXPERIMENT = Path(__file__).parents[3] / "experiments" / "image_classification" / "folder.yaml"
STEPS = 12


def words(photos, *flags):
    """A tiny net with everything that is random switched on, validated in mid-epoch: 4 steps an epoch, 3 epochs."""
    settings = {
        "data.path": photos, "data.size": 8, "data.resize": 10, "data.batch_size": 16, "data.micro_batch_size": 8,
        "data.cache_dir": "cache", "data.num_workers": 0, "data.split.val": 0.25, "data.split.test": 0.08,
        "model.net": "bigmodel.nn.ViT", "model.net.patch_size": 4, "model.net.width": 16, "model.net.depth": 2,
        "model.net.num_heads": 2, "model.net.drop_path": 0.2, "model.net.dropout": 0.1, "model.schedule.warmup_steps": 2,
        "model.test_flips": "true", "trainer.max_epochs": 3, "trainer.precision": "32-true", "trainer.accelerator": "cpu",
        "trainer.val_check_interval": 3, "trainer.check_val_every_n_epoch": "null", "trainer.log_every_n_steps": 1,
        "callbacks.ema": "bigmodel.training.callbacks.EMA", "callbacks.ema.decay": 0.8, "callbacks.progress": "null",
        "callbacks.last.every_n_steps": 1, "callbacks.last.every_n_minutes": "null", "callbacks.last.save_top_k": -1,
    }  # fmt: skip
    listed = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return ["fit", "-c", str(EXPERIMENT), *listed, *map(str, flags)]


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    """One finished run; its folder is the working directory."""
    folder = tmp_path_factory.mktemp("images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        main(words(photos))
        (record,) = Path("runs").glob("**/run.json")
        yield record.parent.resolve()


@pytest.fixture
def folder(straight, monkeypatch):
    monkeypatch.chdir(straight.parents[3])
    return straight.parents[3]


def checkpoint(run, step=STEPS):
    return torch.load(run / "checkpoints" / f"last-{step}.ckpt", weights_only=True)


def column(run, name):
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}


def newest():
    return max((path.parent for path in Path("runs").glob("**/run.json")), key=lambda path: path.stat().st_mtime)


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_run_that_was_stopped_goes_on_exactly(straight, folder, step):
    stopped = folder / f"stopped-{step}"
    shutil.copytree(straight, stopped)
    for path in (stopped / "checkpoints").iterdir():
        if checkpoint_step(path) > step or path.name.startswith("best"):
            path.unlink()
    main(["fit", "--resume", str(stopped)])
    one, other = checkpoint(straight), checkpoint(stopped)
    assert_same(one["state_dict"], other["state_dict"])
    (name,) = (key for key in one["callbacks"] if key.startswith("EMA"))
    assert_same(one["callbacks"][name]["average"], other["callbacks"][name]["average"])
    for metric in ("train/loss", "val/loss", "val/accuracy", "val/auroc"):
        assert column(straight, metric) == column(stopped, metric), metric


def test_micro_batches_add_up_to_the_batch(photos, folder):
    # Without what draws from torch's generator, which is seeded for each micro-batch; mixing stays on.
    # Adam would make much of differences in rounding.
    exact = [
        "--model.net.drop_path",
        0,
        "--model.net.dropout",
        0,
        "--trainer.max_epochs",
        2,
        "--data.balance",
        "weights",
    ]
    exact += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1]
    finished = []
    for micro in (16, 4):
        main(words(photos, *exact, "--data.micro_batch_size", micro))
        finished.append(checkpoint(newest(), 8)["state_dict"])
    assert_same(*finished, rtol=0, atol=2e-6)


def test_what_is_logged_and_drawn(straight, folder):
    assert list(column(straight, "val/accuracy")) == [3, 6, 9, 12]
    logged = set((straight / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {"val/loss", "val/precision", "val/recall", "val/f1", "val/auroc", "val/calibration_error"} <= logged
    assert "speed/images_per_s" in logged
    assert "val/top5_accuracy" not in logged  # of three classes
    main(["test", str(straight)])
    found = json.loads((straight / "test.json").read_text())
    assert {"test/accuracy", "test_flips/accuracy"} <= found.keys()
    for name in ("val_confusion.png", "test_confusion.png"):
        with Image.open(straight / name) as image:
            assert min(image.size) > 200
    mistakes = found["test/accuracy"] < 1
    assert (straight / "test_mistakes.png").exists() == mistakes


def test_a_loaded_task_predicts_what_it_was_tested_on(straight, folder, photos):
    main(["predict", str(straight), "--data.path", str(photos / "warm"), "--output", "warm.parquet"])
    table = parquet.read_table("warm.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == ["cool", "leafy", "warm"]
    rows = table.to_pylist()
    assert len(rows) == 40
    task = bigmodel.load(straight)
    answers = task([row["path"] for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        assert row["class"] == next(iter(answer))  # the likeliest comes first
        assert row["probability"] == pytest.approx(max(answer.values()), abs=1e-5)
        assert row["probabilities"] == pytest.approx([answer[name] for name in task.data_metadata["classes"]], abs=1e-5)
    with Image.open(rows[0]["path"]) as image:
        assert task(image) == pytest.approx(answers[0], abs=1e-5)
        assert task(image.convert("L"))  # grey, for a net of three channels
    assert sum(row["class"] == "warm" for row in rows) > 30


def test_the_loss_is_the_textbook_s():
    torch.manual_seed(0)
    task = ImageClassification(net=lambda num_classes, in_channels, image_size: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(in_channels * image_size**2, num_classes)
    ), label_smoothing=0.1, mean=[0.5], std=[0.25])  # fmt: skip
    task._sizes = {"num_classes": 4, "in_channels": 1, "image_size": 5}
    task.configure_model()
    images, targets = torch.randint(0, 256, (6, 1, 5, 5), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 0, 1])
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.0])
    logits = task.net((images / 255 - 0.5) / 0.25)
    logs = logits.log_softmax(-1)
    each = [-(0.9 * row[t] + 0.1 * row.mean()) for row, t in zip(logs, targets, strict=True)]
    batch = ImageBatch(images, targets, torch.arange(6), weight, torch.arange(6))
    step = task.training_step(batch)
    assert step["count"] == 6
    torch.testing.assert_close(step["loss"], sum(w * loss for w, loss in zip(weight, each, strict=True)))
    soft = F.one_hot(targets, 4).float()
    torch.testing.assert_close(task.training_step(batch._replace(targets=soft))["loss"], step["loss"])


def test_a_grey_net_reads_coloured_images_as_pillow_would():
    task = ImageClassification(mean=[0.0], std=[1.0])
    task.mean, task.std = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    read = task.normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None]) * 255
    assert np.abs(read[0, 0].numpy() - grey).max() <= 1


def test_other_classes_than_those_learned_are_refused(straight, folder, photos, capsys):
    shutil.copytree(photos, "other")
    Path("other/cool").rename("other/aqua")
    with pytest.raises(SystemExit):
        main(["test", str(straight), "--data.path", "other"])
    assert (
        "the classes of --data.path (aqua, leafy, warm) are not those of the training data (cool"
        in capsys.readouterr().err
    )


def test_a_net_of_transformers_is_fine_tuned_and_loads_without_its_folder(folder, photos):
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=4, **sizes, id2label={0: "a", 1: "b", 2: "c"})
    ViTForImageClassification(config).save_pretrained("vit")
    Path("vit/preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    main(words(photos, "--model.net", f"{TASK}.HuggingFace", "--model.net.path", "vit", "--trainer.max_epochs", 1))
    shutil.rmtree("vit")
    task = bigmodel.load(newest())
    assert task.mean.flatten().tolist() == [0.5] * 3
    assert task.std.flatten().tolist() == [0.25] * 3
    assert set(task(photos / "cool" / "00.png")) == {"cool", "leafy", "warm"}


def test_a_checkpoint_of_an_earlier_version_is_read():
    metadata = {"classes": ["cat", "dog"], "size": 8, "resize": 8}
    task = ImageClassification()
    task.on_load_checkpoint({"pictures": metadata})
    assert task.data_metadata == metadata


def test_other_images_are_read_as_the_run_s_and_trained_ones_are_refused(straight, folder, photos, tmp_path, capsys):
    draw = np.random.default_rng(5)
    for name in bigmodel.load(straight).data_metadata["classes"]:  # grey images for a net of three channels
        (tmp_path / "grey" / "test" / name).mkdir(parents=True)
        (tmp_path / "grey" / "train" / name).mkdir(parents=True)
        for i in range(8):
            pixels = draw.integers(0, 255, (10, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "grey" / ("test" if i % 2 else "train") / name / f"{i}.png")
    main(["test", str(straight), "--data.path", str(tmp_path / "grey"), "--data.split.val", "0"])
    task = bigmodel.load(straight)
    files = sorted((tmp_path / "grey" / "test").glob("*/*.png"))
    right = [next(iter(answer)) == file.parent.name for answer, file in zip(task(files), files, strict=True)]
    assert json.loads((straight / "test.json").read_text())["test/accuracy"] == pytest.approx(np.mean(right), abs=1e-6)
    with pytest.raises(SystemExit):
        main(["test", str(straight), "--data.split.test", "0.5"])
    assert "this run was trained on contents of the test split" in capsys.readouterr().err
