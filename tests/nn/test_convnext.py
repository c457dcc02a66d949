"""ConvNeXt against transformers' on the same weights, published sizes, and what the house asks of any net."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from bigmodel.nn import ConvNeXt
from bigmodel.nn.convnext import Block


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(**arguments: Any) -> ConvNeXt:
    sizes = {
        "num_classes": 5,
        "in_channels": 2,
        "image_size": 16,
        "depths": (1, 2),
        "widths": (8, 16),
        "layer_scale": 0.5,
    }
    return ConvNeXt(**sizes | arguments)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Also what starts at zero or one, so that nothing can be swapped or dropped unnoticed."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, 28_589_128),
        ({"depths": (3, 3, 27, 3)}, 50_223_688),
        ({"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)}, 88_591_464),
    ],
    ids=["T", "S", "B"],
)
def test_nets_for_imagenet_have_their_published_size(arguments: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        net = ConvNeXt(num_classes=1000, in_channels=3, image_size=224, **arguments)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


def copy(net: ConvNeXt, model: nn.Module) -> None:
    names = {
        "dwconv": "depthwise", "layernorm": "norm", "pwconv1": "up", "pwconv2": "down",
        "layer_scale_parameter": "scale.weight",
    }  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[1:3] == ["encoder", "stages"]:
            place = int(parts[5]) + (
                2 if parts[4] == "layers" else 0
            )  # blocks follow norm and convolution, or the stem
            end = [names.get(part, part) for part in parts[6:]]
            state[".".join(["stages", parts[3], str(place), *end])] = tensor
        elif parts[1] == "embeddings":
            state[f"stages.0.{0 if parts[2] == 'patch_embeddings' else 1}.{parts[3]}"] = tensor
        else:
            state[f"{'head' if parts[0] == 'classifier' else 'norm'}.{parts[-1]}"] = tensor
    net.load_state_dict(state)


def test_equals_transformers() -> None:
    config = ConvNextConfig(
        num_channels=2, patch_size=4, num_stages=3, hidden_sizes=[8, 16, 32], depths=[1, 2, 1], num_labels=5,
        layer_norm_eps=1e-6, layer_scale_init_value=0.5,
    )  # fmt: skip
    model = ConvNextForImageClassification(config).eval()
    randomise(model)
    net = small(image_size=32, patch_size=4, depths=(1, 2, 1), widths=(8, 16, 32)).eval()
    copy(net, model)
    images = torch.randn(3, 2, 32, 32)
    torch.testing.assert_close(net(images), model(images).logits, atol=1e-5, rtol=1e-5)


def test_channels_last_stays_and_gives_the_same() -> None:
    net, images = small().eval(), torch.randn(3, 2, 16, 16)
    expected = net(images)
    net.to(memory_format=torch.channels_last)
    seen: list[bool] = []
    for block in (m for m in net.modules() if isinstance(m, Block)):
        block.register_forward_hook(lambda _, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-5)
    assert seen == [True] * 3


@pytest.mark.parametrize("arguments", [{}, {"layer_scale": None, "drop_path": 0.1}], ids=["scaled", "not scaled"])
def test_the_gradient_reaches_every_parameter(arguments: dict[str, Any]) -> None:
    net = small(**arguments)
    net(torch.randn(8, 2, 16, 16)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_an_image_is_read_for_itself() -> None:
    net, images = small(drop_path=0.5).eval(), torch.randn(4, 2, 16, 16)
    torch.testing.assert_close(net(images)[2:3], net(images[2:3]))
    torch.testing.assert_close(net(images), net.logits(net.features(images)))


def test_scales_start_where_they_are_told() -> None:
    scales = [block.scale.weight for block in small(layer_scale=1e-6).modules() if isinstance(block, Block)]
    assert len(scales) == 3
    assert all((scale == 1e-6).all() for scale in scales)


@pytest.mark.parametrize(("size", "positions"), [(32, 32), (64, 32), (224, 56)])
def test_the_stem_follows_the_size_of_the_images(size: int, positions: int) -> None:
    with torch.device("meta"):
        net = ConvNeXt(num_classes=5, in_channels=3, image_size=size)
        assert net.stages[0](torch.empty(1, 3, size, size)).shape == (1, 96, positions, positions)


def test_a_net_made_without_memory_becomes_a_real_one() -> None:
    with torch.device("meta"):
        net = small()
    net.to_empty(device="cpu")
    real = small()
    for each in (net, real):
        torch.manual_seed(1)
        each.reset_parameters()
    for name, tensor in real.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name


def test_autocast_to_bfloat16_runs() -> None:
    net = small()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(torch.randn(4, 2, 16, 16))
    logits.float().sum().backward()
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (8,)}, r"widths \[8\] are for 1 stages, depths \[1, 2\] for 2"),
        ({"depths": (1, 0)}, "depths is 0, but must be at least 1; choose --model.net.depths"),
        ({"patch_size": 3}, "16 pixels cannot be cut into patches of 3.*--model.net.patch_size"),
        ({"patch_size": 16}, "16 pixels are too small for 2 stages after patches of 16, which need 32"),
        ({"drop_path": 1.0}, "--model.net.drop_path"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)
