"""Mixed images, targets and weights: against loops, scipy's Beta distribution, and the loss they stand for."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from bigmodel.data.stateless_rng import sample_keys, uniform
from bigmodel.tasks.image_classification.augment import MIX_STREAM
from bigmodel.tasks.image_classification.mixup import MixupCutMix, _Beta

NUM_CLASSES = 5
MIXES = {
    "mixup": MixupCutMix(mixup_alpha=0.8),
    "cutmix": MixupCutMix(cutmix_alpha=1.0),
    "both": MixupCutMix(mixup_alpha=0.2, cutmix_alpha=1.0),
    "some": MixupCutMix(mixup_alpha=0.4, cutmix_alpha=0.7, p=0.5, switch_p=0.3),
}


def batch_of(count, height=8, width=11, channels=3):
    draw = torch.Generator().manual_seed(0)
    return (
        torch.rand(count, channels, height, width, generator=draw),
        torch.randint(0, NUM_CLASSES, (count,), generator=draw),
        torch.rand(count, generator=draw) + 0.5,
        torch.from_numpy(sample_keys(0, 0, np.arange(count))),
    )


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.8, 1.0, 2.0, 8.0])
def test_the_quantiles_are_those_of_the_beta_distribution(alpha):
    edges = [0, 2**-24, 2**-20, 2**-12, 0.5 - 2**-20, 0.5, 0.5 + 2**-20, 1 - 2**-12, 1 - 2**-24]
    probabilities = torch.tensor([*edges, *np.linspace(0.001, 0.999, 2001)], dtype=torch.float32)
    expected = stats.beta.ppf(probabilities.double().numpy(), alpha, alpha)
    np.testing.assert_allclose(_Beta(alpha).quantile(probabilities).numpy(), expected, rtol=0, atol=1e-4)


def test_the_own_share_of_mixup_is_beta_distributed():
    images, _, weight, keys = batch_of(4000, 1, 1, 1)
    for alpha in (0.8, 2.0):
        _, targets, _ = MixupCutMix(mixup_alpha=alpha)(images, torch.arange(4000) % 2, torch.ones_like(weight), keys, 2)
        own = targets[torch.arange(4000), torch.arange(4000) % 2].double().numpy()
        assert stats.kstest(own, stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_each_row_is_what_a_loop_over_rows_and_pixels_makes(mix):
    images, classes, weight, keys = batch_of(60)
    mixed, targets, mixed_weight = mix(images, classes, weight, keys, NUM_CLASSES)
    draws = uniform(keys.numpy(), MIX_STREAM, 5).astype(np.float64)
    height, width = images.shape[2:]
    for row in range(60):
        partner = row + 1 if row % 2 == 0 else row - 1
        chosen, kind, quantile, across, down = draws[row, [0, 1, 2, 4, 3]]
        expected, own = images[row].clone(), 1.0
        is_cut = kind < mix.switch_p if mix.mixup_alpha and mix.cutmix_alpha else mix.cutmix_alpha > 0
        if chosen < mix.p and is_cut:
            side = math.sqrt(1 - stats.beta.ppf(quantile, mix.cutmix_alpha, mix.cutmix_alpha))
            half_height, half_width = int(height * side) // 2, int(width * side) // 2
            y, x = int(down * height), int(across * width)
            replaced = 0
            for i in range(max(y - half_height, 0), min(y + half_height, height)):
                for j in range(max(x - half_width, 0), min(x + half_width, width)):
                    expected[:, i, j] = images[partner, :, i, j]
                    replaced += 1
            own = 1 - replaced / (height * width)
        elif chosen < mix.p:
            own = float(stats.beta.ppf(quantile, mix.mixup_alpha, mix.mixup_alpha))
            expected = own * images[row] + (1 - own) * images[partner]
        torch.testing.assert_close(mixed[row], expected, atol=2e-4, rtol=0)
        own_weight, other_weight = own * float(weight[row]), (1 - own) * float(weight[partner])
        assert float(mixed_weight[row]) == pytest.approx(own_weight + other_weight, abs=2e-4)
        target = torch.zeros(NUM_CLASSES)
        target[classes[row]] += own_weight / (own_weight + other_weight)
        target[classes[partner]] += other_weight / (own_weight + other_weight)
        torch.testing.assert_close(targets[row], target, atol=2e-4, rtol=0)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_targets_sum_to_one_and_the_loss_is_that_of_both_images(mix):
    images, classes, weight, keys = batch_of(200)
    logits = torch.randn(200, NUM_CLASSES, generator=torch.Generator().manual_seed(1))
    _, targets, mixed_weight = mix(images, classes, weight, keys, NUM_CLASSES)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(200))
    # With weights all 1, targets are the shares.
    _, shares, ones = mix(images, classes, torch.ones(200), keys, NUM_CLASSES)
    torch.testing.assert_close(ones, torch.ones(200))
    partner = torch.arange(200) ^ 1
    distinct = classes != classes[partner]
    own = shares[torch.arange(200), classes]
    loss = mixed_weight * F.cross_entropy(logits, targets, reduction="none")
    to_own = weight * F.cross_entropy(logits, classes, reduction="none")
    to_other = weight[partner] * F.cross_entropy(logits, classes[partner], reduction="none")
    torch.testing.assert_close(loss[distinct], (own * to_own + (1 - own) * to_other)[distinct])


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_pair_is_bitwise_the_same_alone_and_anywhere_in_a_batch(mix):
    batch = batch_of(62)
    together = mix(*batch, NUM_CLASSES)
    for first in (0, 6, 60):
        alone = mix(*(part[first : first + 2] for part in batch), NUM_CLASSES)
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part, whole[first : first + 2])
    halves = [mix(*(part[rows] for part in batch), NUM_CLASSES) for rows in (slice(0, 30), slice(30, 62))]
    for whole, *parts in zip(together, *halves, strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_inputs_and_the_global_state_are_not_touched(mix):
    batch = batch_of(20)
    before, state = [part.clone() for part in batch], torch.get_rng_state()
    mixed, targets, _ = mix(*batch, NUM_CLASSES)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(part, as_it_was) for part, as_it_was in zip(batch, before, strict=True))
    assert targets.dtype == torch.float32
    assert 0 <= mixed.min() <= mixed.max() <= 1
    channels_last = batch[0].contiguous(memory_format=torch.channels_last)
    assert torch.equal(mix(channels_last, *batch[1:], NUM_CLASSES)[0], mixed)


@pytest.mark.parametrize("name", MIXES)
def test_off_the_cpu_nothing_waits_for_values(name):
    mix = copy.deepcopy(MIXES[name])  # its tables move to the device
    images, targets, weight = mix(*(part.to("meta") for part in batch_of(4)), NUM_CLASSES)
    assert images.shape == (4, 3, 8, 11)
    assert targets.shape == (4, NUM_CLASSES)
    assert weight.shape == (4,)


def test_the_shares_of_mixed_and_of_cut_images_are_those_asked_for():
    images, classes, weight, keys = batch_of(4000, 6, 6, 1)
    mixed, _, _ = MixupCutMix(1.0, 1.0, p=0.6, switch_p=0.25)(images, classes, weight, keys, NUM_CLASSES)
    from_one = (mixed == images) | (mixed == images[torch.arange(4000) ^ 1])
    mixup = ~from_one.flatten(1).all(dim=1)
    assert abs(mixup.float().mean() - 0.6 * 0.75) < 0.03
    only_some, _, _ = MixupCutMix(cutmix_alpha=8.0, p=0.6)(images, classes, weight, keys, NUM_CLASSES)
    cut = (only_some != images).flatten(1).any(dim=1)
    assert abs(cut.float().mean() - 0.6) < 0.04


def test_rows_that_fill_up_a_batch_have_no_part_in_the_loss():
    images, classes, weight, keys = batch_of(6)
    weight[1] = weight[4] = weight[5] = 0
    _, targets, mixed_weight = MixupCutMix(mixup_alpha=1.0)(images, classes, weight, keys, NUM_CLASSES)
    assert torch.equal(targets[:2], F.one_hot(classes[[0, 0]], NUM_CLASSES).to(torch.float32))
    assert mixed_weight[:2].sum() > 0
    assert torch.equal(mixed_weight[4:], torch.zeros(2))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_other_keys_mix_otherwise():
    images, classes, weight, keys = batch_of(10)
    mix = MIXES["mixup"]
    first, second = (mix(images, classes, weight, k, NUM_CLASSES)[0] for k in (keys, keys + 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (MixupCutMix, "--data.mix mixes nothing: set --data.mix.mixup_alpha or --data.mix.cutmix_alpha above 0"),
        (lambda: MixupCutMix(mixup_alpha=-0.1), "--data.mix.mixup_alpha is -0.1"),
        (lambda: MixupCutMix(cutmix_alpha=float("nan")), "--data.mix.cutmix_alpha is nan"),
        (lambda: MixupCutMix(mixup_alpha=1.0, p=1.1), "--data.mix.p is 1.1, but must be in 0 to 1"),
        (lambda: MixupCutMix(mixup_alpha=1.0, switch_p=-1.0), "--data.mix.switch_p is -1"),
        (
            lambda: MixupCutMix(mixup_alpha=1.0)(*batch_of(3), NUM_CLASSES),
            "a micro-batch has 3: set an even --data.micro_batch_size",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
