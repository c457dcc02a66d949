"""Speeds measured on this machine, and stored between runs in <cache>/machine/<key>.json.

The key is a digest of the properties that a speed depends on: the processor, its features, the version of torch. If the
file cannot be read or written, speeds are measured again. One thread's CPU time is measured, which other work changes
little.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bigmodel.data.cache import cache_folder, digest

# Dense TFLOP/s from the manufacturers' data sheets, without sparsity: of 16-bit inputs (TF32 has half of it, float8 twice
# as much), and of float32 without tensor cores.
_GPUS = {
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "A10": (125, 31.2),
}
_LARGEST = 2048  # of a weight's sizes: speeds do not change beyond it
_OPERATIONS = 1 << 27  # multiply-adds of a product, at most
_ROWS = 512  # of a product, such as the tokens of a micro-batch
_IMAGES, _PIXELS = 8, 14  # of a convolution: images, and their height and width
_SIZES = (64, 128, 256, 512, 1024)  # of square matrices, for the peak
_SECONDS = 0.04  # of CPU time, in which a layer is measured repeatedly
_BLOCK = 0.002  # of CPU time, the minimum of one measurement

Shape = tuple[int, ...]  # of a weight: [out, in], or of a convolution [out, in / groups, height, width]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, with gradients, whatever the caller's settings are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def cpu() -> dict[str, Any]:
    """Return the properties of this CPU and of torch on which speeds depend."""
    names, flags = [platform.processor()], ""
    with suppress(OSError):  # Linux only
        text = Path("/proc/cpuinfo").read_text()
        names = re.findall(r"^model name\s*: (.*)", text, re.MULTILINE) or names
        flags = next(iter(re.findall(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)), "")
    limits = {name: os.environ[name] for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if name in os.environ}
    return {
        "machine": platform.machine(),
        "processor": names[0],
        "flags": digest(sorted(flags.split())),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "limits": limits,
        "torch": str(torch.__version__),
    }


def measured_once(
    name: str, measure: Callable[[], float], better: Callable[[float, float], float] | None = None
) -> float:
    """Return a value of this machine: the cached one, else measured now and cached.

    Args:
        name: of the value.
        measure: measures it.
        better: measure in any case, and store this choice of the old and the new value, such as `max` for a peak.
    """
    machine = cpu()
    path = cache_folder("machine") / f"{digest(machine)}.json"
    figures: dict[str, float] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError):
        found = json.loads(path.read_text())["figures"]
        figures = {key: float(value) for key, value in found.items() if math.isfinite(value) and value > 0}
    known = figures.get(name)
    if known is not None and better is None:
        return known
    value = measure()
    if known is not None and better is not None:
        value = better(known, value)
    if value != known:
        partial = path.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # a read-only home
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({**machine, "figures": {**figures, name: value}}, indent=2))
            partial.replace(path)
    return value


def bf16_speed(shape: Shape) -> float:
    """Return the speed of bf16 autocast over float32 on this CPU, forward and backward, for a layer of this weight.

    Measured once on a machine, in about a tenth of a second.

    Args:
        shape: of the weight, [out, in], or of a convolution [out, in / groups, height, width].
    """
    limited = (*(min(size, _LARGEST) for size in shape[:2]), *shape[2:])
    return measured_once(f"bf16 {'x'.join(map(str, limited))}", lambda: _bf16_speed(limited))


@_one_thread()
def _bf16_speed(shape: Shape) -> float:
    steps = [_training_step(shape, dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for step in steps:
        step()  # warm-up: allocates memory, chooses kernels
    start, rounds = time.thread_time(), 0
    while rounds < 3 or time.thread_time() - start < _SECONDS:
        best = [min(least, _seconds(step)) for least, step in zip(best, steps, strict=True)]
        rounds += 1
        if best[1] > 4 * best[0]:  # emulated: the result is clear, and measuring is slow
            break
    return best[0] / best[1]


def _seconds(step: Callable[[], object]) -> float:
    """Return the CPU time of a call, over enough calls for the clock's resolution."""
    calls = 1
    while True:
        start = time.thread_time()
        for _ in range(calls):
            step()
        if (spent := time.thread_time() - start) >= _BLOCK:
            return spent / calls
        calls *= 2


def _training_step(shape: Shape, dtype: torch.dtype) -> Callable[[], None]:
    """Return a forward and backward pass of a layer with this weight, under autocast to this type."""
    weight = torch.full(shape, 0.01)
    if len(shape) == 2:
        rows = max(32, min(_ROWS, _OPERATIONS // weight.numel()))
        x, layer = torch.full((rows, shape[1]), 0.01), F.linear
    else:
        kind = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
        x = torch.full((_IMAGES, shape[1], *[_PIXELS] * (len(shape) - 2)), 0.01)
        layer = functools.partial(kind, padding=[size // 2 for size in shape[2:]])
    x.requires_grad_()
    weight.requires_grad_()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x, weight)
        torch.autograd.grad(y, (x, weight), torch.ones_like(y))

    return step


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak rate of matrix products of this type on a device, in FLOP/s; None if it is unknown.

    For a GPU, from its manufacturer's data sheet. For a CPU, that of one thread times the number of threads: the best
    of square products of several sizes, in this run or an earlier one on this machine.

    Args:
        device: where the products are computed.
        dtype: of their inputs, for example torch.bfloat16 or torch.float8_e4m3fn.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        rates = next((rates for known, rates in _GPUS.items() if known in name), None)
        if rates is None:
            return None
        tensor_cores, plain = rates
        if dtype == torch.float32:
            return 1e12 * (tensor_cores / 2 if torch.get_float32_matmul_precision() != "highest" else plain)
        return 1e12 * tensor_cores * (2 if dtype.itemsize == 1 else 1)
    if device.type != "cpu":
        return None
    one = measured_once(
        f"peak FLOP/s of a thread, {str(dtype).removeprefix('torch.')}", lambda: _peak_flops(dtype), max
    )
    return one * torch.get_num_threads()


@_one_thread()
def _peak_flops(dtype: torch.dtype) -> float:
    best = 0.0
    for size in _SIZES:
        a = torch.full((size, size), 0.01, dtype=dtype)
        torch.mm(a, a)
        seconds = min(_seconds(functools.partial(torch.mm, a, a)) for _ in range(5))
        best = max(best, 2 * size**3 / seconds)
        if seconds > _SECONDS:  # emulated: larger ones are not faster, and slow
            break
    return best
