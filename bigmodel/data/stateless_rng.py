"""Random numbers that are a function of (seed, epoch, sample) only.

They do not depend on the batch that contains the sample, the process or device that draws, or earlier draws. Each
sample of an epoch has a key of 64 bits; each random property of it (position of a crop, masked tokens) is hashed from
its key and a stream, one stream for each kind of draw. The same key and stream give the same bits in numpy and in
torch, on any device. The hash is the finalizer of SplitMix64 (Steele, Lea and Flood 2014).

B samples.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_Ints = TypeVar("_Ints", np.ndarray, Tensor)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed integers, which wrap around equally in numpy and torch
_WORD = 0xFFFFFFFFFFFFFFFF
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def hash_seed(*numbers: int) -> int:
    """Return a well-mixed 64-bit number, for seeding a generator by (seed, epoch, sample, ...). SplitMix64."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _WORD)) + 0x9E3779B97F4A7C15 & _WORD
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _WORD
        state ^= state >> 31
    return state


def _finalize(x: _Ints) -> _Ints:
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _FIRST  # logical shifts: the copied sign bits are masked
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _SECOND
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def sample_keys(seed: int, epoch: int, samples: _Ints) -> _Ints:
    """Return the keys [B] int64 of samples [B] (int64 numbers) in an epoch; on the samples' device."""
    start = hash_seed(seed, epoch)
    samples = samples.long() if isinstance(samples, Tensor) else samples.astype(np.int64)
    return _finalize(_finalize(samples + (start - (start >> 63 << 64))) + _GOLDEN)


def random_bits(keys: _Ints, stream: int, count: int) -> _Ints:
    """Return random int64 numbers [B, count], over the whole range, from keys [B]; on the keys' device."""
    start = hash_seed(stream)
    steps: _Ints
    if isinstance(keys, Tensor):
        steps = torch.arange(1, count + 1, device=keys.device)  # created on the device: a copy would synchronize
    else:
        steps = np.arange(1, count + 1, dtype=np.int64)
    return _finalize(_finalize(keys ^ (start - (start >> 63 << 64)))[:, None] + steps * _GOLDEN)


def uniform(keys: _Ints, stream: int, count: int = 1) -> _Ints:
    """Return random float32 numbers [B, count] in [0, 1), multiples of 2^-24, from keys [B]; on the keys' device."""
    top = random_bits(keys, stream, count) >> 40 & 0xFFFFFF
    return top.to(torch.float32) * 2.0**-24 if isinstance(top, Tensor) else top.astype(np.float32) * np.float32(2**-24)
