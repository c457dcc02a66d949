"""The memory format channels_last, with a guard against a convolution whose gradient oneDNN computes wrongly in it.

Source: oneDNN issue 6035 (the workspace of strided 1x1 convolutions is overrun in backward_weights), in oneDNN 3.12 of torch
2.13, and as measured there. B batch, C channels, H and W pixels, K channels out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MIN_CHANNELS = 16  # a block of AVX-512's kernel, the widest; AVX2's has 8


class SubsampledConv2d(nn.Conv2d):
    """A 1x1 convolution of stride s without padding: [B, C, H, W] -> [B, K, ceil(H / s), ceil(W / s)].

    Takes every s-th pixel, then convolves with stride 1: the same result as `nn.Conv2d` with the same arguments.
    """

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> SubsampledConv2d:
        """Return a layer that shares the parameters of a 1x1 convolution."""
        down, right = conv.stride
        with torch.device("meta"):  # no memory, no random draws
            layer = cls(conv.in_channels, conv.out_channels, 1, (down, right), bias=conv.bias is not None)
        layer.weight, layer.bias = conv.weight, conv.bias
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        down, right = self.stride
        return F.conv2d(input[:, :, ::down, ::right], self.weight, self.bias)


def guard_convolutions(net: nn.Module) -> None:
    """Replace convolutions with a wrong gradient in channels_last by `SubsampledConv2d`, in place.

    On x86 processors the weights' gradient of a 1x1 convolution with a stride above 1, no padding, one group and fewer than
    16 input channels in channels_last overruns its workspace: wrong gradients, a hang, an abort or a segmentation fault. On
    AVX2 it occurs below 8 input channels from 8x8 pixels on, with AVX-512 below 16 channels (bfloat16 too) on larger
    images; never with 16 channels or more, stride 1, or a kernel larger than 1x1. The format of the input decides,
    whatever that of the weights, so a contiguous net is not safe from it. These convolutions are therefore computed in
    another way, in any format and on any device, so that results do not depend on the machine. All others stay as they are,
    subclasses of `nn.Conv2d` too. Names and parameters do not change. Calling it again changes nothing.
    """
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and _is_broken(child):
                setattr(parent, name, SubsampledConv2d.from_conv(child))


def _is_broken(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
        and conv.in_channels < _MIN_CHANNELS
    )


def to_channels_last(net: nn.Module) -> None:
    """Convert the net's weights to channels_last, in place, and apply `guard_convolutions`."""
    guard_convolutions(net)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
