"""The plain nets: what they compute, how large they are, and what the house asks of any net."""

from typing import Any

import pytest
import torch
from torch import nn

from bigmodel.nn import CNN, MLP, VGG


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def mlp(**arguments: Any) -> MLP:
    return MLP(**{"num_classes": 5, "in_channels": 2, "image_size": 8, "widths": (6, 4)} | arguments)


def cnn(**arguments: Any) -> CNN:
    return CNN(**{"num_classes": 5, "in_channels": 2, "image_size": 8, "width": 4} | arguments)


def vgg(**arguments: Any) -> VGG:
    return VGG(**{"num_classes": 5, "in_channels": 2, "image_size": 32, "depth": 11} | arguments)


nets = pytest.mark.parametrize("make", [mlp, cnn, vgg])


def images_for(net: nn.Module, batch_size: int = 4) -> torch.Tensor:
    size = 32 if isinstance(net, VGG) else 8
    return torch.randn(batch_size, 2, size, size)


def test_mlp_is_its_formula() -> None:
    net, images = mlp(), torch.randn(3, 2, 8, 8)
    weights = dict(net.named_parameters())
    x = images.reshape(3, -1)
    for i in range(2):
        x = (x @ weights[f"blocks.{i}.0.weight"].T + weights[f"blocks.{i}.0.bias"]).clamp(min=0)
    torch.testing.assert_close(net.features(images), x)
    torch.testing.assert_close(net(images), x @ weights["head.weight"].T + weights["head.bias"])


def test_mlp_without_hidden_layers_is_logistic_regression() -> None:
    net, images = mlp(widths=()), torch.randn(3, 2, 8, 8)
    assert count(net) == 2 * 64 * 5 + 5
    torch.testing.assert_close(net(images), images.flatten(1) @ net.head.weight.T + net.head.bias)


@torch.no_grad()
def test_cnn_is_its_formula() -> None:
    net, x = cnn(depth=1).eval(), torch.randn(3, 2, 8, 8)
    images = x
    for i, stage in enumerate(net.stages):
        if i > 0:
            x = x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax(dim=(3, 5))  # [B, C, h / 2, 2, w / 2, 2]
        conv = stage[-3]
        nn.init.normal_(stage[-2].running_mean)
        x = nn.functional.conv2d(x, conv.weight, padding=1) - stage[-2].running_mean[:, None, None]
        x = (x / (1 + stage[-2].eps) ** 0.5).clamp(min=0)
    torch.testing.assert_close(net.features(images), x.mean(dim=(2, 3)))


def test_cnn_is_small_and_ends_at_a_few_positions() -> None:
    assert count(CNN(num_classes=10, in_channels=1, image_size=28)) == 121_274
    for size, side in ((8, 2), (28, 7), (32, 8), (64, 8), (96, 6)):
        with torch.device("meta"):
            x = torch.empty(1, 1, size, size)
            for stage in CNN(num_classes=10, in_channels=1, image_size=size).stages:
                x = stage(x)
        assert x.shape[2:] == (side, side)


@pytest.mark.parametrize(
    ("depth", "expected"), [(11, 132_863_336), (13, 133_047_848), (16, 138_357_544), (19, 143_667_240)]
)
def test_vgg_has_its_published_size(depth: int, expected: int) -> None:
    with torch.device("meta"):
        plain = VGG(num_classes=1000, in_channels=3, image_size=224, depth=depth, batch_norm=False)
        normed = VGG(num_classes=1000, in_channels=3, image_size=224, depth=depth)
    assert count(plain) == expected
    channels = sum(module.num_features for module in normed.modules() if isinstance(module, nn.BatchNorm2d))
    assert count(normed) == expected + channels  # a scale and a shift each, where there was a bias
    layers = [module for module in plain.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize(("size", "width"), [(32, 512), (64, 512), (65, 4096), (224, 4096)])
def test_the_classifier_of_vgg_follows_the_size_of_the_images(size: int, width: int) -> None:
    with torch.device("meta"):
        net = vgg(image_size=size)
        assert net.features(torch.empty(1, 2, size, size)).shape == (1, width)


@nets
def test_features_and_logits_part_the_net(make: Any) -> None:
    net = make().eval()
    images = images_for(net)
    torch.testing.assert_close(net(images), net.logits(net.features(images)))
    torch.testing.assert_close(net(images)[2:3], net(images[2:3]))
    assert net(images).shape == (4, 5)


@nets
def test_channels_last_stays_and_gives_the_same(make: Any) -> None:
    net = make().eval()
    images = images_for(net)
    expected = net(images)
    net.to(memory_format=torch.channels_last)
    seen: list[bool] = []
    for stage in getattr(net, "stages", []):
        stage.register_forward_hook(lambda _, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-5)
    assert all(seen)


@pytest.mark.parametrize("make", [mlp, cnn, vgg, lambda: vgg(batch_norm=False)])
def test_the_gradient_reaches_every_parameter(make: Any) -> None:
    net = make()
    net(images_for(net, 8)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("make", [lambda: mlp(dropout=0.5, widths=(64,)), lambda: vgg(dropout=0.5)])
def test_dropout_acts_in_training_only(make: Any) -> None:
    net = make().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = images_for(net)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


@nets
def test_a_net_made_without_memory_becomes_a_real_one(make: Any) -> None:
    with torch.device("meta"):
        net = make()
    net.to_empty(device="cpu")
    real = make()
    for each in (net, real):
        torch.manual_seed(1)
        each.reset_parameters()
    for name, tensor in real.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name


@nets
def test_autocast_to_bfloat16_runs(make: Any) -> None:
    net = make()
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images_for(net))
    logits.float().sum().backward()
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (mlp, {"widths": (6, 0)}, "widths is 0, but must be at least 1; choose --model.net.widths"),
        (mlp, {"dropout": 1.0}, r"dropout 1.0 is not in \[0, 1\); choose --model.net.dropout"),
        (cnn, {"width": 0}, "--model.net.width"),
        (cnn, {"depth": 0}, "--model.net.depth"),
        (vgg, {"depth": 12}, "no VGG of depth 12: choose --model.net.depth 11, 13, 16, 19"),
        (vgg, {"image_size": 28}, "28 pixels are too small for VGG"),
        (vgg, {"classifier": "conv"}, "classifier 'conv' is none of auto, linear, mlp; choose --model.net.classifier"),
        (vgg, {"dropout": -1.0}, "--model.net.dropout"),
    ],
)
def test_bad_arguments_are_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_images_of_another_size_are_refused_by_the_mlp() -> None:
    with pytest.raises(ValueError, match=r"images have shape \[1, 2, 9, 9\].*\[batch, 2, 8, 8\]"):
        mlp()(torch.randn(1, 2, 9, 9))
