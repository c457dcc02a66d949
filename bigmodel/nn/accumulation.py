"""Dtype of long sums and metrics by device: float64, or float32 where the device lacks it.

Apple's MPS has no float64: sums and metrics are float32 there. Untested on MPS, because no such machine was available;
the tests use another device in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WITHOUT_FLOAT64 = {"mps"}  # types of devices


def accumulation_dtype(device: torch.device | None = None) -> torch.dtype:
    """Return the dtype of long sums on a device: float64; float32 on devices without float64, which is Apple's MPS.

    Untested on MPS, because no such machine was available.

    Args:
        device: None: the default device of new tensors, also inside `with torch.device(...)`.
    """
    kind = (torch.empty(0).device if device is None else device).type
    return torch.float32 if kind in _WITHOUT_FLOAT64 else torch.float64


def accumulable(x: Tensor) -> Tensor:
    """Convert a tensor to the `accumulation_dtype` of its device."""
    return x.to(accumulation_dtype(x.device))


class Accumulates(nn.Module):
    """Mixin, placed before torchmetrics' class, of a metric whose states are sums in `accumulation_dtype`.

    The states move with the module, and stay in the device's `accumulation_dtype` when the module becomes bfloat16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        if getattr(self, "_dtype_convert", False):  # torchmetrics' `set_dtype`
            return super()._apply(fn, *args, **kwargs)
        return super()._apply(lambda x: _moved(x, fn), *args, **kwargs)


def _moved(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Move x to the device of `fn`; sums get the accumulation dtype of the device, other tensors keep their dtype."""
    device = fn(x.new_empty(0, dtype=torch.float32)).device
    was_sum = x.dtype == torch.float64 or (x.is_floating_point() and x.device.type in _WITHOUT_FLOAT64)
    dtype = accumulation_dtype(device) if was_sum else x.dtype
    return x.to(device).to(dtype) if dtype == torch.float64 else x.to(dtype).to(device)
