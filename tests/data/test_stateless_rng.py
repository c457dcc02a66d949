"""Random numbers by sample: the same in numpy and torch, in any company, and as random as they should be."""

import numpy as np
import pytest
import torch

from bigmodel.data.stateless_rng import hash_seed, random_bits, sample_keys, uniform

M = (1 << 64) - 1


def splitmix(x):
    """The finalizer as published, in Python's unbounded integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M
    return x ^ x >> 31


def test_the_hash_is_splitmix64():
    # SplitMix64 seeded with 0 gives these numbers (reference implementation by Vigna).
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    keys = np.array([0, 1, -1, 2**63 - 1, -(2**63)], np.int64)
    for stream in (0, 7):
        found = random_bits(keys, stream, 3)
        for key, row in zip(keys.tolist(), found.tolist(), strict=True):
            start = splitmix((key & M) ^ hash_seed(stream))
            assert [x & M for x in row] == [splitmix(start + i * 0x9E3779B97F4A7C15 & M) for i in (1, 2, 3)]


def test_numpy_and_torch_give_the_same_bits_and_a_row_depends_on_its_key_alone():
    keys = sample_keys(3, 5, np.arange(1000))
    by_torch = uniform(torch.from_numpy(keys), 2, 4)
    assert np.array_equal(uniform(keys, 2, 4), by_torch.numpy())
    assert by_torch.dtype == torch.float32
    assert torch.equal(uniform(torch.from_numpy(keys[17:18]), 2, 4), by_torch[17:18])
    assert np.array_equal(sample_keys(3, 5, np.array([7])), keys[7:8])
    assert np.array_equal(sample_keys(3, 5, torch.arange(1000)).numpy(), keys)


def test_keys_differ_between_seeds_epochs_and_samples():
    keys = [sample_keys(seed, epoch, np.arange(500)) for seed in range(4) for epoch in range(4)]
    assert len(np.unique(np.concatenate(keys))) == 16 * 500


@pytest.mark.parametrize("across", ["samples", "epochs", "streams", "count"])
def test_numbers_are_uniform_and_independent(across):
    n = 20_000
    if across == "samples":
        x = uniform(sample_keys(0, 0, np.arange(n)), 0)[:, 0]
    elif across == "epochs":
        x = np.concatenate([uniform(sample_keys(0, epoch, np.array([5])), 0)[0] for epoch in range(n)])
    elif across == "streams":
        key = sample_keys(0, 0, np.array([5]))
        x = np.concatenate([uniform(key, stream)[0] for stream in range(n)])
    else:
        x = uniform(sample_keys(0, 0, np.array([5])), 0, n)[0]
    assert x.min() >= 0
    assert x.max() < 1
    counts = np.bincount((x * 16).astype(int), minlength=16)
    assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 37.7  # chi-square, 15 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.025


def test_mix_separates_its_numbers():
    assert len({hash_seed(a, b) for a in range(50) for b in range(50)}) == 2500
    assert hash_seed(1, 2) != hash_seed(2, 1)
