"""What a kind of device lacks, and what is used there instead.

Apple's MPS has no float64: sums and metrics keep to float32 there. Not tried: no such machine was at hand; the tests let
another device stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WITHOUT_FLOAT64 = {"mps"}  # types of devices


def accumulation_dtype(device: torch.device | None = None) -> torch.dtype:
    """What long sums are computed in on a device: float64; float32 where it has no float64, which is Apple's MPS.

    Not tried on MPS: no such machine was at hand.

    Args:
        device: None: that on which new tensors are made, inside `with torch.device(...)` too.
    """
    kind = (torch.empty(0).device if device is None else device).type
    return torch.float32 if kind in _WITHOUT_FLOAT64 else torch.float64


def accumulable(x: Tensor) -> Tensor:
    """The tensor in the `accumulation_dtype` of its device."""
    return x.to(accumulation_dtype(x.device))


class Accumulates(nn.Module):
    """A base, named before torchmetrics' class, of a metric whose states are sums in `accumulation_dtype`.

    They go along to a device, and keep to its `accumulation_dtype` where the module around becomes bfloat16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        if getattr(self, "_dtype_convert", False):  # torchmetrics' `set_dtype`
            return super()._apply(fn, *args, **kwargs)
        return super()._apply(lambda x: _moved(x, fn), *args, **kwargs)


def _moved(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """x on the device that `fn` puts tensors on; sums in what that device sums in, all else in its own type."""
    device = fn(x.new_empty(0, dtype=torch.float32)).device
    was_sum = x.dtype == torch.float64 or (x.is_floating_point() and x.device.type in _WITHOUT_FLOAT64)
    dtype = accumulation_dtype(device) if was_sum else x.dtype
    return x.to(device).to(dtype) if dtype == torch.float64 else x.to(dtype).to(device)
