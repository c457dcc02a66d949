"""Operations on values: against Pillow, the standard library's colour spaces, and what was drawn."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from bigmodel.data.stateless_rng import sample_keys, uniform
from bigmodel.tasks.image_classification import color
from bigmodel.tasks.image_classification.color import ColorJitter, RandomGrayscale


def keys_of(count):
    return torch.from_numpy(sample_keys(5, 0, np.arange(count)))


def noise(count, channels, height, width, low=0, high=256):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(low, high, (count, channels, height, width), generator=draw, dtype=torch.uint8)


def by_pillow(levels, operation):
    """An operation on [C, H, W] uint8, as float64."""
    pixels = levels.permute(1, 2, 0).numpy()
    result = np.asarray(operation(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)))
    return result.reshape(pixels.shape).transpose(2, 0, 1).astype(np.float64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (color.brightness, ImageEnhance.Brightness),
        (color.contrast, ImageEnhance.Contrast),
        (color.saturation, ImageEnhance.Color),
        (color.sharpness, ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_those_of_pillow_within_its_rounding(ours, pillows, channels):
    levels = noise(5, channels, 13, 10)
    factors = torch.tensor([0.0, 0.3, 1.0, 1.6, 1.9])
    results = ours(levels / 255, factors).double().numpy() * 255
    for row, factor in enumerate(factors.tolist()):
        expected = by_pillow(levels[row], lambda image, factor=factor: pillows(image).enhance(factor))
        assert np.abs(results[row] - expected).max() < 1.01 + abs(1 - factor)  # the result's rounding, the origin's


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_levels_are_exactly_those_of_pillow(channels):
    levels = torch.cat(
        (noise(3, channels, 40, 30), noise(2, channels, 40, 30, 90, 120), noise(1, channels, 40, 30, 7, 8))
    )
    images = levels / 255
    for dropped in range(1, 7):
        ours = color.posterize(images, torch.full((6,), dropped, dtype=torch.int32))
        for row in range(6):
            expected = by_pillow(levels[row], lambda image, bits=8 - dropped: ImageOps.posterize(image, bits))
            np.testing.assert_array_equal((ours[row] * 255).round().numpy(), expected)
    for threshold in (0, 100, 178.5, 255):
        ours = color.solarize(images, torch.full((6,), float(threshold)))
        for row in range(6):
            expected = by_pillow(levels[row], lambda image, at=threshold: ImageOps.solarize(image, at))
            np.testing.assert_array_equal((ours[row] * 255).round().numpy(), expected)
    ours = color.equalize(images)
    for row in range(6):
        np.testing.assert_array_equal((ours[row] * 255).round().numpy(), by_pillow(levels[row], ImageOps.equalize))


@pytest.mark.parametrize(
    ("height", "width"), [(5, 5), (22, 24), (31, 33)]
)  # levels beyond 255 are cut, few pixels stay
def test_equalize_is_exact_at_sizes_that_do_not_divide(height, width):
    levels = noise(4, 3, height, width, 20, 200)
    ours = (color.equalize(levels / 255) * 255).round().numpy()
    for row in range(4):
        np.testing.assert_array_equal(ours[row], by_pillow(levels[row], ImageOps.equalize))


@pytest.mark.parametrize("channels", [1, 3])
def test_autocontrast_is_that_of_pillow_within_its_rounding(channels):
    levels = torch.cat((noise(3, channels, 12, 9, 40, 180), noise(1, channels, 12, 9, 7, 8)))
    ours = color.autocontrast(levels / 255).double().numpy() * 255
    for row in range(4):
        assert np.abs(ours[row] - by_pillow(levels[row], ImageOps.autocontrast)).max() < 1.01


def test_turned_hue_is_that_of_the_standard_library():
    images = torch.cat((noise(4, 3, 5, 6), noise(1, 3, 5, 6, 9, 12), noise(1, 1, 5, 6).expand(-1, 3, -1, -1))) / 255
    turns = torch.tensor([-0.5, -0.2, 0.0, 0.3, 0.5, 0.4])
    ours = color.turn_hue(images, turns)
    for row in range(6):
        for i in range(5):
            for j in range(6):
                hue, saturation, value = colorsys.rgb_to_hsv(*images[row, :, i, j].double().tolist())
                expected = colorsys.hsv_to_rgb((hue + float(turns[row])) % 1, saturation, value)
                np.testing.assert_allclose(ours[row, :, i, j].numpy(), expected, atol=1e-5)


def test_jitter_draws_factors_from_one_and_applies_them_in_its_order():
    images, keys = noise(500, 3, 6, 6) / 255, keys_of(500)
    either_way = uniform(keys, 9, 4) * 2 - 1
    jittered = ColorJitter(0.4, 0.3, 1.5, 0.1)(images, keys, 9)
    expected = color.brightness(images, 1 + 0.4 * either_way[:, 0])
    expected = color.contrast(expected, 1 + 0.3 * either_way[:, 1])
    expected = color.saturation(expected, (1 + 1.5 * either_way[:, 2]).clamp(min=0))  # never beyond grey
    expected = color.turn_hue(expected, 0.1 * either_way[:, 3])
    torch.testing.assert_close(jittered, expected)
    brightened = ColorJitter(brightness=0.4)(torch.full_like(images, 0.5), keys, 9)[:, 0, 0, 0] / 0.5
    assert 0.6 <= brightened.min() < 0.62
    assert 1.38 < brightened.max() <= 1.4
    assert abs(brightened.mean() - 1) < 0.03


def test_jitter_of_nothing_and_the_colour_of_grey_images_change_nothing():
    keys = keys_of(6)
    for images in (noise(6, 3, 5, 5) / 255, noise(6, 7, 5, 5) / 255):
        assert torch.equal(ColorJitter()(images, keys, 0), images)
    grey = noise(6, 1, 5, 5) / 255
    assert torch.equal(ColorJitter(saturation=0.9, hue=0.5)(grey, keys, 0), grey)
    assert torch.equal(RandomGrayscale(1.0)(grey, keys, 0), grey)


def test_the_share_asked_for_becomes_grey():
    levels = noise(2000, 3, 4, 4)
    result = RandomGrayscale(0.2)(levels / 255, keys_of(2000), 0)
    grey = (result == result[:, :1]).flatten(1).all(dim=1)
    assert abs(grey.float().mean() - 0.2) < 0.03
    assert torch.equal(result[~grey], levels[~grey] / 255)
    row = int(grey.nonzero()[0])
    expected = by_pillow(levels[row], lambda image: image.convert("L").convert("RGB"))
    assert np.abs(result[row].double().numpy() * 255 - expected).max() < 1.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColorJitter(brightness=-1), "--data.augment: ColorJitter brightness is -1, but must be 0 or more"),
        (lambda: ColorJitter(hue=0.6), "hue is 0.6, but must be in 0 to 0.5"),
        (lambda: RandomGrayscale(2), "Grayscale p is 2"),
        (lambda: RandomGrayscale()(noise(2, 4, 5, 5) / 255, keys_of(2), 0), "1 or 3 channels, not 4"),
        (lambda: ColorJitter(hue=0.1)(noise(2, 2, 5, 5) / 255, keys_of(2), 0), "1 or 3 channels, not 2"),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
