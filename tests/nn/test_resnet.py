"""Residual networks against transformers' on the same weights, published sizes, and what the house asks of any net."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from bigmodel.nn import ResNet
from bigmodel.nn.resnet import Block


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def made_without_memory(**arguments: Any) -> ResNet:
    with torch.device("meta"):
        return ResNet(**arguments)


@pytest.mark.parametrize(
    ("depth", "expected"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160), (152, 60_192_808)]
)
def test_nets_for_imagenet_have_their_published_size(depth: int, expected: int) -> None:
    assert count(made_without_memory(num_classes=1000, in_channels=3, image_size=224, depth=depth)) == expected


DISTILLED = {"widths": (64, 128, 256), "stem_width": 32}


@pytest.mark.parametrize(
    ("arguments", "num_classes", "expected"),
    [
        ({}, 10, 11_173_962),
        ({"depth": 20}, 100, 278_324),
        ({"depth": 8, **DISTILLED}, 100, 1_233_540),
        ({"depth": 32, **DISTILLED}, 100, 7_433_860),
    ],
    ids=["resnet18", "resnet20", "resnet8x4", "resnet32x4"],
)
def test_nets_for_cifar_have_their_published_size(arguments: dict[str, Any], num_classes: int, expected: int) -> None:
    assert count(made_without_memory(num_classes=num_classes, in_channels=3, image_size=32, **arguments)) == expected


@pytest.mark.parametrize("depth", [8, 20, 32, 44, 56, 110, 18, 34, 50, 101, 152])
def test_the_depth_counts_the_layers_with_weights(depth: int) -> None:
    net = made_without_memory(num_classes=10, in_channels=3, image_size=32, depth=depth)
    layers = [
        name for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(layers) == depth


def test_blocks_and_widths_describe_any_net() -> None:
    sizes = {"num_classes": 10, "in_channels": 1, "image_size": 28}
    small = made_without_memory(**sizes, blocks=(2, 2, 2), widths=(16, 32, 64))
    assert count(small) == count(made_without_memory(**sizes, depth=14)) == 174_970
    wide = made_without_memory(**sizes, depth=14, width_factor=4)
    assert count(wide) == count(made_without_memory(**sizes, blocks=(2, 2, 2)))  # 64, 128, 256
    deep = made_without_memory(**sizes, blocks=(3, 4, 6, 3), bottleneck=True)
    assert count(deep) == count(made_without_memory(**sizes, depth=50))


@pytest.mark.parametrize(("size", "positions"), [(32, 32), (64, 64), (65, 17), (224, 56)])
def test_the_stem_follows_the_size_of_the_images(size: int, positions: int) -> None:
    net = made_without_memory(num_classes=10, in_channels=3, image_size=size)
    assert net.stem(torch.empty(1, 3, size, size, device="meta")).shape == (1, 64, positions, positions)


def transformers_model(layer_type: str) -> ResNetForImageClassification:
    sizes = [32, 64] if layer_type == "bottleneck" else [8, 16]
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=sizes, depths=[2, 3], layer_type=layer_type, num_labels=5
    )
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # also what starts at zero or one
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor) if "running_var" in name else 0.1 * torch.randn_like(tensor))
    return model


def copy(net: ResNet, model: nn.Module) -> None:
    """Both hold the same layers in the same order, but shortcuts stand before branches there."""
    ours = sorted(net.state_dict().items(), key=lambda item: _place(item[0]))
    theirs = sorted(model.state_dict().items(), key=lambda item: _place(item[0]))
    assert [a.shape for _, a in ours] == [b.shape for _, b in theirs]
    net.load_state_dict({name: tensor for (name, _), (_, tensor) in zip(ours, theirs, strict=True)})


def _place(name: str) -> tuple[int, list[int], bool]:
    """Stem, stages, head; in a stage its number and the block's; the branch first. Python's sort keeps the rest."""
    part = 1 if "stages" in name else 2 if name.startswith(("head", "classifier")) else 0
    numbers = [int(x) for x in name.split(".") if x.isdigit()][:2] if part == 1 else []
    return part, numbers, "shortcut" in name


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equals_transformers(layer_type: str, training: bool) -> None:
    model = transformers_model(layer_type).train(training)
    net = ResNet(
        num_classes=5, in_channels=3, image_size=40, stem="imagenet", blocks=(2, 3), widths=(8, 16),
        bottleneck=layer_type == "bottleneck",
    ).train(training)  # fmt: skip
    copy(net, model)
    images = torch.randn(4, 3, 40, 40)
    for _ in range(2):
        torch.testing.assert_close(net(images), model(images).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.stem[1].running_var, model.resnet.embedder.embedder.normalization.running_var)


VARIANTS = {
    "cifar": {"depth": 8},
    "imagenet": {"blocks": (1, 1), "widths": (8, 16), "stem": "imagenet"},
    "bottleneck": {"blocks": (1, 2), "widths": (8, 16), "bottleneck": True, "drop_path": 0.2},
}
variants = pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)


def small(**arguments: Any) -> ResNet:
    return ResNet(num_classes=5, in_channels=2, image_size=16, **arguments)


@variants
def test_channels_last_stays_and_gives_the_same(arguments: dict[str, Any]) -> None:
    net, images = small(**arguments, zero_init=False).eval(), torch.randn(3, 2, 16, 16)
    expected = net(images)
    net.to(memory_format=torch.channels_last)
    seen: list[bool] = []
    for block in (m for m in net.modules() if isinstance(m, Block)):
        block.register_forward_hook(lambda _, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-5)
    assert seen
    assert all(seen)


@variants
def test_the_gradient_reaches_every_parameter(arguments: dict[str, Any]) -> None:
    net = small(**arguments, zero_init=False)
    net(torch.randn(8, 2, 16, 16)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@variants
def test_an_image_is_read_for_itself_in_evaluation(arguments: dict[str, Any]) -> None:
    net, images = small(**arguments).eval(), torch.randn(4, 2, 16, 16)
    torch.testing.assert_close(net(images)[2:3], net(images[2:3]))
    torch.testing.assert_close(net(images), net.logits(net.features(images)))


def test_a_new_nets_blocks_are_shortcuts_unless_told_otherwise() -> None:
    x = torch.rand(2, 16, 8, 8)
    same = small(depth=8).stages[0][0](x)
    torch.testing.assert_close(same, x)
    assert not torch.allclose(small(depth=8, zero_init=False).stages[0][0](x), x)


def test_convolutions_start_with_the_variance_of_their_fan_out() -> None:
    for module in ResNet(num_classes=10, in_channels=3, image_size=32).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.out_channels * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_a_net_made_without_memory_becomes_a_real_one() -> None:
    net = made_without_memory(num_classes=5, in_channels=2, image_size=16, depth=8).to_empty(device="cpu")
    torch.manual_seed(1)
    net.reset_parameters()
    real = small(depth=8)
    torch.manual_seed(1)
    real.reset_parameters()
    for name, tensor in real.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name


def test_autocast_to_bfloat16_runs() -> None:
    net, images = small(depth=8).to(memory_format=torch.channels_last), torch.randn(4, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images)
    logits.float().sum().backward()
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 19}, r"no ResNet of depth 19: set --model.net.depth to 18, 34, 50, 101, 152, or 6 n \+ 2"),
        ({"depth": 2}, "no ResNet of depth 2"),
        ({"depth": 18, "blocks": (2, 2)}, r"depth 18 and blocks \[2, 2\].*--model.net.depth and --model.net.blocks"),
        ({"blocks": (2, 2), "widths": (8,)}, r"widths \[8\] are for 1 stages, blocks \[2, 2\] for 2"),
        ({"depth": 20, "widths": (8, 16)}, r"widths \[8, 16\] are for 2 stages, blocks \[3, 3, 3\] for 3"),
        ({"blocks": ()}, "widths"),
        ({"blocks": (0, 1)}, "blocks is 0, but must be at least 1; choose --model.net.blocks"),
        ({"stem": "vgg"}, "stem 'vgg' is none of auto, imagenet, cifar; choose --model.net.stem"),
        ({"depth": 20, "width_factor": 0.3}, "makes 4.8 channels of 16; choose --model.net.width_factor"),
        ({"depth": 8, "drop_path": 1.0}, "--model.net.drop_path"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)
