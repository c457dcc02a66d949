"""Convolutions that oneDNN computes wrongly in channels_last are computed in another way, and no others."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigmodel.nn import ResNet, guard_convolutions, to_channels_last

SCRIPT = Path(__file__).parents[1] / "launches" / "few_channels.py"
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.parametrize(
    ("cases", "processor"),
    [("image_task published backbone", AVX2), ("image_task", {})],
    ids=["avx2", "this"],
)
def test_nets_of_few_channels_have_right_gradients_in_channels_last(cases: str, processor: dict[str, str]) -> None:
    """In a process with a time limit: the fault is a hang or a crash as often as a wrong number."""
    environment = {name: value for name, value in os.environ.items() if name not in AVX2} | processor
    command = [sys.executable, str(SCRIPT), *cases.split()]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    except subprocess.TimeoutExpired:
        pytest.fail("the net of few channels hangs")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"{case}: the same" for case in cases.split()]


@pytest.mark.parametrize(
    ("arguments", "guarded"),
    [
        ({"in_channels": 4, "kernel_size": 1, "stride": 2}, True),
        ({"in_channels": 15, "kernel_size": 1, "stride": (1, 3)}, True),
        ({"in_channels": 8, "kernel_size": 1, "stride": 2, "padding": "valid"}, True),
        ({"in_channels": 16, "kernel_size": 1, "stride": 2}, False),
        ({"in_channels": 4, "kernel_size": 1, "stride": 1}, False),
        ({"in_channels": 4, "kernel_size": 1, "stride": 2, "padding": 1}, False),
        ({"in_channels": 4, "kernel_size": 1, "stride": 2, "groups": 2}, False),
        ({"in_channels": 3, "kernel_size": 7, "stride": 2}, False),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_only_narrow_strided_pointwise_convolutions_are_guarded(
    arguments: dict[str, Any], guarded: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(out_channels=6, bias=bias, **arguments))
    net = copy.deepcopy(plain)
    for _ in range(2):
        guard_convolutions(net)
    assert (type(net[0]) is not nn.Conv2d) == guarded
    assert net.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, arguments["in_channels"], 9, 12)
    values = net(images)
    torch.testing.assert_close(values, plain(images), atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(values)
    for each in (net, plain):
        (each(images) * weights).sum().backward()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-5)


def test_other_convolutions_take_channels_last_and_a_subclass_is_left_alone() -> None:
    class Own(nn.Conv2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Own(8, 8, 1, 2), nn.Conv2d(8, 4, 1, 2))
    to_channels_last(net)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not net[0].weight.is_contiguous()
    assert [type(layer) in (nn.Conv2d, Own) for layer in net] == [True, True, False]


def test_a_resnet_is_guarded_by_itself() -> None:
    sizes = {"num_classes": 2, "in_channels": 3, "image_size": 32}
    narrow, wide = (ResNet(**sizes, blocks=(1, 1), widths=widths) for widths in ((4, 8), (16, 32)))
    assert [type(net.stages[1][0].shortcut[0]) is nn.Conv2d for net in (narrow, wide)] == [False, True]
    reread = copy.deepcopy(narrow)
    reread.load_state_dict(narrow.state_dict())
    assert type(reread.stages[1][0].shortcut[0]) is type(narrow.stages[1][0].shortcut[0])
