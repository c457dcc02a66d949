"""Models of transformers as nets, on tiny random ones that stand in folders as the hub's do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    LevitConfig,
    LevitForImageClassificationWithTeacher,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils import logging

from bigmodel.tasks.image_classification.hugging_face import HuggingFace

S = 32


@pytest.fixture(autouse=True)
def _quiet_and_seeded() -> None:
    torch.manual_seed(0)
    logging.disable_progress_bar()


def vit_config(**options: Any) -> ViTConfig:
    return ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=S, patch_size=8,
        num_labels=5, **options,
    )  # fmt: skip


def tiny(kind: str) -> PreTrainedModel:
    if kind == "vit":
        return ViTForImageClassification(vit_config())
    if kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
        return ResNetForImageClassification(config)
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    return ConvNextForImageClassification(config)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def net_of(
    path: str, *, num_classes: int = 5, in_channels: int = 3, image_size: int = S, **options: Any
) -> HuggingFace:
    return HuggingFace(num_classes=num_classes, in_channels=in_channels, image_size=image_size, path=path, **options)


def images(in_channels: int = 3) -> Tensor:
    return torch.randn(2, in_channels, S, S)


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_gives_the_logits_of_the_model_and_parts_them_at_the_head(kind: str, tmp_path: Path) -> None:
    model, x = tiny(kind).eval(), images()
    net = net_of(saved(model, tmp_path))
    assert all(module.training for module in net.modules())
    net.eval()
    torch.testing.assert_close(net(x), model(x).logits)
    features = net.features(x)
    assert features.shape == (2, 16)
    torch.testing.assert_close(net.logits(features), net(x))
    assert list(net.state_dict()) == [f"model.{name}" for name in model.state_dict()]


def test_gradients_reach_every_parameter_through_features(tmp_path: Path) -> None:
    net = net_of(saved(tiny("vit"), tmp_path))
    net.logits(net.features(images())).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_head_for_other_classes_is_made_anew_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("vit")
    net = net_of(saved(model, tmp_path), num_classes=7)
    assert capsys.readouterr().err == f"{tmp_path}: the head is newly initialised for 7 classes\n"
    assert net.eval()(images()).shape == (2, 7)
    for name, tensor in model.vit.state_dict().items():
        assert torch.equal(net.state_dict()[f"model.vit.{name}"], tensor), name


def test_a_head_for_as_many_classes_is_kept_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net_of(saved(tiny("vit"), tmp_path))
    assert capsys.readouterr().err == ""


def test_a_model_without_head_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ViTModel(vit_config(), add_pooling_layer=False)
    net, x = net_of(saved(model, tmp_path)).eval(), images()
    assert "newly initialised for 5 classes" in capsys.readouterr().err
    torch.testing.assert_close(net.features(x), model.eval()(x).last_hidden_state[:, 0])


def test_weights_for_other_sizes_are_refused_unless_excused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tiny("vit"), tmp_path)
    with pytest.raises(
        ValueError, match=r"do not fit:\n  vit.embeddings.position_embeddings: shape \(1, 17, 16\)"
    ) as error:
        net_of(path, image_size=64)
    assert "--data.size 32, --data.channels 3" in str(error.value)
    with pytest.raises(ValueError, match=r"projection.weight: shape \(16, 3, 8, 8\), the model .* has \(16, 1, 8, 8\)"):
        net_of(path, in_channels=1)
    capsys.readouterr()
    net = net_of(path, image_size=64, ignore_mismatched=["*.position_embeddings"])
    assert "ignored weights, not loaded: vit.embeddings.position_embeddings" in capsys.readouterr().err
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_weights_left_over_are_refused(tmp_path: Path) -> None:
    path = saved(ViTModel(vit_config()), tmp_path)
    with pytest.raises(ValueError, match=r"pooler.dense.bias: left over\n.*pooler.dense.weight: left over"):
        net_of(path)
    net_of(path, ignore_mismatched=["*pooler*"])


def test_not_pretrained_takes_the_architecture_only(tmp_path: Path) -> None:
    model = tiny("resnet")
    path = saved(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    net = net_of(path, pretrained=False, num_classes=3, in_channels=1)
    assert net(images(1)).shape == (2, 3)
    weight = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    assert not torch.equal(net.state_dict()[f"model.{weight}"], model.state_dict()[weight])


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_its_config_builds_it_again_without_hub_or_folder(kind: str, tmp_path: Path) -> None:
    net = net_of(saved(tiny(kind), tmp_path / "model"), num_classes=7).eval()
    torch.save({"config": net.config, "weights": net.state_dict()}, tmp_path / "kept")
    shutil.rmtree(tmp_path / "model")
    kept = torch.load(tmp_path / "kept", weights_only=True)
    again = net_of(str(tmp_path / "model"), num_classes=7, config=kept["config"]).eval()
    again.load_state_dict(kept["weights"])
    assert again.config == net.config
    x = images()
    torch.testing.assert_close(again(x), net(x))
    torch.testing.assert_close(again.features(x), net.features(x))


HALF = [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, None),
        ({"image_mean": HALF, "image_std": HALF}, (HALF, HALF)),
        ({"image_mean": HALF, "image_std": HALF, "rescale_factor": 1 / 127.5}, ([0.25] * 3, [0.25] * 3)),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, (HALF, [0.2] * 3)),
        ({"image_mean": HALF, "image_std": HALF, "do_normalize": False}, ([0.0] * 3, [1.0] * 3)),
        ({"image_mean": [0.5], "image_std": [0.5]}, None),
        ({"do_resize": True}, None),
    ],
)
def test_the_normalization_is_that_of_the_folder(settings: Any, expected: Any, tmp_path: Path) -> None:
    path = saved(tiny("resnet"), tmp_path)
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    normalization = net_of(path).normalization
    assert (normalization is None) == (expected is None)
    if normalization is not None:
        for ours, theirs in zip(normalization, expected, strict=True):
            assert ours == pytest.approx(theirs)


def test_weights_in_half_precision_are_trained_in_float32(tmp_path: Path) -> None:
    net = net_of(saved(tiny("vit").half(), tmp_path))
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_a_model_that_ends_in_no_linear_layer_is_not_parted(tmp_path: Path) -> None:
    config = LevitConfig(
        image_size=64, num_attention_heads=[2, 2, 2], hidden_sizes=[16, 32, 48], depths=[1, 1, 1], key_dim=[8, 8, 8],
        num_labels=5,
    )  # fmt: skip
    model = LevitForImageClassificationWithTeacher(config).eval()  # the mean of two heads
    net, x = net_of(saved(model, tmp_path), image_size=64).eval(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net(x), model(x).logits)
    assert torch.equal(net.features(x), net(x))
    assert torch.equal(net.logits(net.features(x)), net(x))
    again = net_of("gone", image_size=64, config=net.config)
    again.load_state_dict(net.state_dict())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model.net.path .*none gives no image classifier"):
        net_of(str(tmp_path / "none"))
    path = saved(tiny("vit"), tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(tiny("vit").state_dict(), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ValueError, match="safetensors"):
        net_of(path)


def test_images_that_the_model_cannot_read_are_refused(tmp_path: Path) -> None:
    path = saved(tiny("convnext"), tmp_path)
    with pytest.raises(ValueError, match=r"cannot read images of 3 channel\(s\) and 4 pixels.*--data.channels"):
        net_of(path, image_size=4)
