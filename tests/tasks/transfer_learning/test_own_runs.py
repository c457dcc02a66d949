"""Runs of bigmodel as backbones: a fitted language model and image classifier, and all nets."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import bigmodel
from bigmodel.cli import main
from bigmodel.run import build, describe
from bigmodel.tasks.transfer_learning.backbones import build_backbone, find_text_encoder, rebuild
from bigmodel.tasks.transfer_learning.backbones.from_run import RunBackbone
from bigmodel.tasks.transfer_learning.net import TransferNet

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
IMAGE_SIZES = {"num_classes": 2, "in_channels": 3, "image_size": 16}
COMMON = {
    "data.cache_dir": "cache", "data.batch_size": 8, "trainer.max_steps": 2, "trainer.max_epochs": "null",
    "trainer.val_check_interval": 2, "trainer.precision": "32-true", "trainer.accelerator": "cpu",
    "callbacks.progress": "null",
}  # fmt: skip
TEXT = {
    "model.net": "bigmodel.nn.GPT", "model.net.width": 16, "model.net.depth": 2, "model.net.num_heads": 2,
    "model.net.tied_head": "false", "data.path": "text", "data.num_processes": 1,
    "data.tokenizer": "bigmodel.tasks.language_modeling.Bytes",
    "data.split": "bigmodel.tasks.language_modeling.ContiguousSplit",
    "data.split.val": 0.3, "data.context_length": 32, "callbacks.samples": "null",
}  # fmt: skip
IMAGE = {
    "model.net": "bigmodel.nn.CNN",
    "model.net.depth": 1,
    "data.path": "photos",
    "data.size": 16,
    "data.num_workers": 0,
}


class Texts(NamedTuple):
    tokens: Tensor
    mask: Tensor


class Images(NamedTuple):
    images: Tensor


def fit(experiment: str, settings: dict[str, object]) -> Path:
    before = set(Path("runs").glob("**/run.json"))
    words = [str(word) for key, value in (settings | COMMON).items() for word in (f"--{key}", value)]
    main(["fit", "-c", str(EXPERIMENTS / experiment), *words])
    (record,) = set(Path("runs").glob("**/run.json")) - before
    return record.parent.resolve()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The directories of two runs, of texts and of images."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("a rose is a rose is a rose, and a daisy is none. " * 60)
    draw = np.random.default_rng(0)
    for name in ("dark", "light"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = draw.integers(0, 128, (16, 16, 3)) + 100 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "photos" / name / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        found = {
            "text": fit("language_modeling/stdlib.yaml", TEXT),
            "images": fit("image_classification/folder.yaml", IMAGE),
        }
    return {name: str(path) for name, path in found.items()}


def batch_of(modality: str) -> Texts | Images:
    if modality == "images":
        return Images(torch.randint(0, 256, (2, 3, 16, 16)).byte())
    return Texts(
        torch.tensor([[256, 97, 32, 98], [256, 99, 256, 256]]), torch.tensor([[True] * 4, [True] * 2 + [False] * 2])
    )


@pytest.mark.parametrize("modality", ["text", "images"])
def test_features_of_a_run_and_rebuild_without_it(modality: str, runs: dict[str, str], tmp_path: Path) -> None:
    run = shutil.copytree(runs[modality], tmp_path / "run")
    backbone, task, batch = build_backbone(str(run)), bigmodel.load(run), batch_of(modality)
    assert backbone.training
    assert (backbone.modality, backbone.pooling) == (modality, "last" if modality == "text" else None)
    backbone.eval()
    assert torch.equal(backbone(batch)[0], task.features(batch))
    scratch = build_backbone(str(run), pretrained=False)
    torch.save({"description": backbone.description, "weights": backbone.state_dict()}, tmp_path / "kept")
    shutil.rmtree(run)
    kept = torch.load(tmp_path / "kept", weights_only=True)
    again = rebuild(kept["description"]).eval()
    assert again.description == backbone.description == scratch.description
    assert not torch.equal(again(batch)[0], backbone(batch)[0])
    again.load_state_dict(kept["weights"])
    scratch.load_state_dict(kept["weights"])
    assert torch.equal(again(batch)[0], backbone(batch)[0])


def test_tokenizer_and_positions_of_a_language_model(runs: dict[str, str]) -> None:
    encoder = find_text_encoder(runs["text"])
    assert encoder is not None
    assert [row.tolist() for row in encoder.encode(["ab"])] == [[256, 97, 98]]
    assert encoder.max_length == 32
    assert build_backbone(runs["text"]).text_encoder.fingerprint == encoder.fingerprint
    assert find_text_encoder(runs["images"]) is None


def test_runs_that_do_not_match_the_data_raise(runs: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is a model of text, and the data are images"):
        build_backbone(runs["text"], data_sizes=IMAGE_SIZES)
    with pytest.raises(ValueError, match="is a model of images, and the data are text"):
        build_backbone(runs["images"], data_sizes={"num_classes": 2})
    with pytest.raises(
        ValueError, match=r"this CNN does not accept images of 3 channel\(s\) and 1 pixels.*image_size 16"
    ):
        build_backbone(runs["images"], data_sizes=IMAGE_SIZES | {"image_size": 1})


def described(net: str, **options: object) -> dict[str, object]:
    """The result of `describe`, for an untrained task."""
    if net == "GPT":
        model = {"class_path": "bigmodel.tasks.language_modeling.LanguageModeling"}
        sizes, saved = {"vocab_size": 257, "context_length": 8}, {"tokenizer": '{"kind": "bytes"}'}
    else:
        model = {"class_path": "bigmodel.tasks.image_classification.ImageClassification"}
        sizes, saved = IMAGE_SIZES | {"image_size": 32}, {"pictures": {"classes": ["a", "b"], "size": 32, "resize": 32}}
    init_args = {"net": {"class_path": f"bigmodel.nn.{net}", "init_args": options}}
    return {"model": {**model, "init_args": init_args}, "sizes": sizes, "saved": saved}


@pytest.mark.parametrize(
    ("net", "options", "num_layers"),
    [
        ("GPT", {"width": 8, "num_heads": 2, "depth": 3, "tied_head": False, "norm": "rms"}, 3),
        ("ViT", {"width": 8, "num_heads": 2, "depth": 3, "num_registers": 1}, 3),
        ("ResNet", {"blocks": [1, 2], "widths": [4, 8]}, 2),
        ("ConvNeXt", {"depths": [1, 1], "widths": [4, 8]}, 2),
        ("CNN", {"width": 4, "depth": 1}, 3),
        ("VGG", {"depth": 11}, 5),
    ],
)
def test_every_parameter_has_a_gradient_and_a_layer(net: str, options: dict[str, object], num_layers: int) -> None:
    task = build(described(net, **options))
    assert describe(task) == described(net, **options)
    backbone = RunBackbone(task)
    assert backbone.num_layers == num_layers
    whole = TransferNet(backbone, 2)
    whole(batch_of("text") if net == "GPT" else Images(torch.rand(2, 3, 32, 32))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in whole.parameters())
    for name, _ in backbone.named_parameters():
        number = re.search(r"(?:blocks|stages)\.(\d+)", name)
        outside = num_layers + 1 if name.startswith("task.net.norm") else 0
        assert backbone.layer_of(name) == (outside if number is None else 1 + int(number[1])), name
