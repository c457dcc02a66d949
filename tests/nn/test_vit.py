"""The vision transformer against transformers' on the same weights, and the properties of its tokens and positions."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from bigmodel.nn import ViT
from bigmodel.nn.vit import sincos_positions


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(**arguments: Any) -> ViT:
    sizes = {
        "num_classes": 5,
        "in_channels": 2,
        "image_size": 12,
        "patch_size": 4,
        "width": 16,
        "depth": 2,
        "num_heads": 2,
    }
    return ViT(**sizes | arguments)


VARIANTS = {
    "class": {},
    "mean": {"pool": "mean"},
    "registers": {"num_registers": 3, "pool": "mean"},
    "sincos": {"positions": "sincos", "num_registers": 1},
    "layer scale": {"layer_scale": 0.1, "qkv_bias": False, "drop_path": 0.1},
}
variants = pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Also what starts at zero or one, so that nothing can be swapped or dropped unnoticed."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 5_717_416),
        ({"width": 384, "num_heads": 6}, 22_050_664),
        ({"width": 768, "num_heads": 12}, 86_567_656),
        ({"width": 1024, "num_heads": 16, "depth": 24}, 304_326_632),
    ],
    ids=["Ti", "S", "B", "L"],
)
def test_nets_for_imagenet_have_their_published_size(arguments: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        net = ViT(num_classes=1000, in_channels=3, image_size=224, **arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


def weights(model: ViTForImageClassification) -> dict[str, torch.Tensor]:
    """Of transformers' model with two heads, under our names."""
    source = model.state_dict()
    state = {
        "class_token": source["vit.embeddings.cls_token"][0, 0],
        "positions": source["vit.embeddings.position_embeddings"][0],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embedding.{kind}"] = source[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = source[f"vit.layernorm.{kind}"]
        state[f"head.{kind}"] = source[f"classifier.{kind}"]
        for i in range(len(model.vit.layers)):
            old, new = f"vit.layers.{i}", f"blocks.{i}"
            projections = [source[f"{old}.attention.{x}_proj.{kind}"].unflatten(0, (2, 1, -1)) for x in "qkv"]
            state[f"{new}.attention.qkv.{kind}"] = torch.cat(projections, dim=1).flatten(0, 2)  # by head
            state[f"{new}.attention.out.{kind}"] = source[f"{old}.attention.o_proj.{kind}"]
            state[f"{new}.attention_norm.{kind}"] = source[f"{old}.layernorm_before.{kind}"]
            state[f"{new}.mlp_norm.{kind}"] = source[f"{old}.layernorm_after.{kind}"]
            state[f"{new}.mlp.up.{kind}"] = source[f"{old}.mlp.fc1.{kind}"]
            state[f"{new}.mlp.down.{kind}"] = source[f"{old}.mlp.fc2.{kind}"]
    return state


def transformers_model() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=12, patch_size=4,
        num_channels=2, num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    randomise(model)
    return model


def test_equals_transformers() -> None:
    model = transformers_model()
    net = small().eval()
    net.load_state_dict(weights(model))
    images = torch.randn(3, 2, 12, 12)
    torch.testing.assert_close(net(images), model(images).logits, atol=1e-5, rtol=1e-5)


def test_the_mean_is_over_the_patches_outputs() -> None:
    model = transformers_model()
    net = small(pool="mean").eval()
    state = weights(model)
    del state["class_token"]
    net.load_state_dict(state | {"positions": state["positions"][1:]})
    images = torch.randn(3, 2, 12, 12)
    tokens = model.vit.embeddings.patch_embeddings(images) + model.vit.embeddings.position_embeddings[:, 1:]
    for layer in model.vit.layers:
        tokens = layer(tokens)
    expected = model.classifier(model.vit.layernorm(tokens).mean(dim=1))
    torch.testing.assert_close(net(images), expected, atol=1e-5, rtol=1e-5)


def test_sincos_positions_equal_a_loop() -> None:
    positions = sincos_positions(3, 8)
    for row in range(3):
        for column in range(3):
            expected = []
            for coordinate in (column, row):
                for wave in (math.sin, math.cos):
                    expected += [wave(coordinate * 10_000 ** (-4 * i / 8)) for i in range(2)]
            torch.testing.assert_close(positions[3 * row + column], torch.tensor(expected))


def test_fixed_positions_are_not_trained_and_leave_the_class_token_out() -> None:
    net = small(positions="sincos")
    assert "positions" not in net.state_dict()
    assert not net.positions[0].any()
    torch.testing.assert_close(net.positions[1:], sincos_positions(3, 16))


@torch.no_grad()
def test_without_positions_the_order_of_patches_is_not_seen() -> None:
    images = torch.randn(2, 2, 12, 12)
    patches = images.unflatten(2, (3, 4)).unflatten(4, (3, 4))  # [B, C, 3, 4, 3, 4]
    moved = patches.flip(2).flatten(4, 5).flatten(2, 3)
    for pool in ("class", "mean"):
        net = small(pool=pool, num_registers=2).eval()
        randomise(net)
        assert not torch.allclose(net(images), net(moved), atol=1e-4)
        nn.init.zeros_(net.positions)
        torch.testing.assert_close(net(images), net(moved), atol=1e-5, rtol=1e-5)


def test_registers_are_attended_to_but_not_pooled() -> None:
    net, images = small(pool="mean", num_registers=2).eval(), torch.randn(2, 2, 12, 12)
    randomise(net)
    outputs: list[torch.Tensor] = []
    net.blocks[-1].register_forward_hook(lambda _, x, y: outputs.append(y))
    features = net.features(images)
    assert outputs[0].shape == (2, 9 + 2, 16)
    torch.testing.assert_close(features, net.norm(outputs[0][:, :9]).mean(dim=1))
    with torch.no_grad():
        net.registers.add_(torch.randn_like(net.registers))
    assert not torch.allclose(net.features(images), features, atol=1e-4)


def test_layer_scale_multiplies_both_branches() -> None:
    scaled, plain, images = small(layer_scale=0.5), small(), torch.randn(2, 2, 12, 12)
    randomise(plain)
    state = plain.state_dict()
    scaled.load_state_dict(state, strict=False)
    for name in state:
        if name.endswith(("attention.out.weight", "attention.out.bias", "mlp.down.weight", "mlp.down.bias")):
            state[name] = 0.5 * state[name]
    plain.load_state_dict(state)
    torch.testing.assert_close(scaled(images), plain(images))


def test_dropout_acts_in_training_only() -> None:
    net, images = small(dropout=0.5), torch.randn(2, 2, 12, 12)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


@variants
def test_the_gradient_reaches_every_parameter(arguments: dict[str, Any]) -> None:
    net = small(**arguments)
    randomise(net)
    net(torch.randn(8, 2, 12, 12)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@variants
def test_an_image_is_read_for_itself(arguments: dict[str, Any]) -> None:
    net, images = small(**arguments).eval(), torch.randn(4, 2, 12, 12)
    torch.testing.assert_close(net(images)[2:3], net(images[2:3]))
    torch.testing.assert_close(net(images), net.logits(net.features(images)))
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), net(images))


@variants
def test_a_net_made_without_memory_becomes_a_real_one(arguments: dict[str, Any]) -> None:
    with torch.device("meta"):
        net = small(**arguments)
    net.to_empty(device="cpu")
    real = small(**arguments)
    for each in (net, real):
        torch.manual_seed(1)
        each.reset_parameters()
    for name, tensor in [*real.named_parameters(), *real.named_buffers()]:
        assert torch.equal(dict([*net.named_parameters(), *net.named_buffers()])[name], tensor), name


def test_weights_start_as_a_normal_truncated_at_two_standard_deviations() -> None:
    net = ViT(num_classes=10, in_channels=3, image_size=32, depth=2, num_registers=8)
    for name, parameter in net.named_parameters():
        if parameter.numel() > 10_000:
            assert 0.039 < parameter.abs().max() <= 0.04, name
            assert parameter.std().item() == pytest.approx(0.02 * 0.8796, rel=0.03), name


@pytest.mark.parametrize(("size", "patch_size"), [(28, 4), (64, 4), (224, 16)])
def test_the_patches_follow_the_size_of_the_images(size: int, patch_size: int) -> None:
    with torch.device("meta"):
        assert ViT(num_classes=2, in_channels=1, image_size=size).num_patches == (size // patch_size) ** 2


@variants
def test_autocast_to_bfloat16_runs_and_keeps_the_residuals_in_float32(arguments: dict[str, Any]) -> None:
    net = small(**arguments)
    dtypes: list[torch.dtype] = []
    for block in net.blocks:
        block.register_forward_hook(lambda _, x, y: dtypes.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.randn(4, 2, 12, 12))
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert dtypes == [torch.float32] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 5}, r"12 pixels cannot be cut into patches of 5.*--model.net.patch_size \(1, 2, 3, 4, 6, 12\)"),
        ({"num_heads": 3}, "width 16 is not divisible by num_heads 3; choose --model.net.width"),
        ({"width": 6, "positions": "sincos"}, "width 6 is not divisible by 4.*--model.net.positions learned"),
        ({"num_registers": -1}, "num_registers is -1"),
        ({"depth": 0}, "depth is 0, but must be at least 1; choose --model.net.depth"),
        ({"pool": "max"}, "pool 'max' is none of class, mean; choose --model.net.pool"),
        ({"positions": "rotary"}, "positions 'rotary' is none of learned, sincos; choose --model.net.positions"),
        ({"dropout": 1.0}, "--model.net.dropout"),
        ({"drop_path": -0.1}, "--model.net.drop_path"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have shape \[1, 2, 16, 16\].*\[batch, 2, 12, 12\]"):
        small()(torch.randn(1, 2, 16, 16))
