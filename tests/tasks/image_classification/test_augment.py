"""A row's augmentation depends on its image and key alone; policies and erasing do what their papers say."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from bigmodel.data.stateless_rng import sample_keys
from bigmodel.tasks.image_classification import auto_augment as policies
from bigmodel.tasks.image_classification.augment import Transform, augment
from bigmodel.tasks.image_classification.auto_augment import RandAugment, TrivialAugmentWide
from bigmodel.tasks.image_classification.color import ColorJitter, RandomGrayscale
from bigmodel.tasks.image_classification.geometry import RandomAffine, RandomCrop, RandomFlip, RandomResizedCrop
from bigmodel.tasks.image_classification.random_erasing import RandomErasing

TRANSFORMS = [
    RandomCrop(3),
    RandomCrop(3, "reflect"),
    RandomCrop(3, "edge"),
    RandomFlip(),
    RandomFlip(vertical=True),
    RandomAffine(30, 0.2, (0.8, 1.3), 20),
    RandomResizedCrop(),
    ColorJitter(0.4, 0.4, 0.4, 0.3),
    RandomGrayscale(0.5),
    RandAugment(),
    RandAugment(3, 30),
    TrivialAugmentWide(),
    RandomErasing(0.7),
    RandomErasing(0.7, value=0.5),
]
SHAPES = [(3, 16, 12), (1, 9, 9)]


def name_of(transform):
    return type(transform).__name__


def keys_of(count, epoch=0):
    return torch.from_numpy(sample_keys(0, epoch, np.arange(count)))


def random_images(count, shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_a_row_is_bitwise_the_same_alone_and_anywhere_in_a_batch(transform, shape):
    images, keys = random_images(37, shape), keys_of(37)
    together = augment(images, keys, [transform])
    alone = torch.cat([augment(images[i : i + 1], keys[i : i + 1], [transform]) for i in range(len(images))])
    assert torch.equal(together, alone)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(together[order], augment(images[order], keys[order], [transform]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_the_result_is_new_of_the_same_shape_and_range_and_the_global_state_is_not_touched(transform, shape):
    images, keys = random_images(37, shape).to(torch.float32) / 255, keys_of(37)
    before, state = images.clone(), torch.get_rng_state()
    result = augment(images, keys, [transform])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(images, before)
    assert result.shape == images.shape
    assert result.dtype == torch.float32
    assert result.min() >= 0
    assert result.max() <= 1
    assert not torch.equal(result, images) or (shape[0] == 1 and isinstance(transform, RandomGrayscale))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_the_memory_format_changes_no_value_and_is_kept_where_nothing_is_interpolated(transform):
    images, keys = random_images(16, SHAPES[0]), keys_of(16)
    channels_last = augment(images.contiguous(memory_format=torch.channels_last), keys, [transform])
    assert torch.equal(channels_last, augment(images, keys, [transform]))
    if not isinstance(transform, RandomAffine | RandomResizedCrop):  # the kernel of which gives the other
        assert channels_last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_off_the_cpu_nothing_waits_for_values(transform, shape):
    images, keys = random_images(4, shape).to("meta"), keys_of(4).to("meta")  # which has no values to wait for
    assert augment(images, keys, [transform]).shape == images.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_all_rows_computed_and_the_chosen_ones_taken_is_the_same(transform, shape, monkeypatch):
    def as_on_a_gpu(images, rows, change, *arguments):
        return images.copy_(torch.where(rows[:, None, None, None], change(images, *arguments), images))

    images, keys = random_images(37, shape), keys_of(37)
    on_cpu = augment(images, keys, [transform])
    for module in ("random_erasing", "auto_augment"):
        monkeypatch.setattr(f"bigmodel.tasks.image_classification.{module}.change_rows_", as_on_a_gpu)
    assert torch.equal(augment(images, keys, [transform]), on_cpu)


def test_levels_become_values_once_and_each_place_in_the_list_draws_anew():
    images, keys = random_images(64, SHAPES[0]), keys_of(64)
    assert torch.equal(augment(images, keys, []), images.to(torch.float32) / 255)
    streams = []

    class Record(Transform):
        def __call__(self, images, keys, stream):
            streams.append(stream)
            return images

    augment(images, keys, [Record(), Record(), Record()])
    assert np.diff(streams).tolist() == [64, 64]
    once, twice = augment(images, keys, [RandomFlip()]), augment(images, keys, [RandomFlip(), RandomFlip()])
    unchanged = (twice == augment(images, keys, [])).flatten(1).all(dim=1)
    assert 16 < unchanged.sum() < 48  # all of them, if both flips were the same draw
    assert not torch.equal(once, augment(images, keys_of(64, epoch=1), [RandomFlip()]))


# Each operation of the policies, at a magnitude from 0 to 1, as Pillow does it.
def affine(a, b, c, d, e, f):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
    )


def enhance(kind, signed):
    return lambda image: kind(image).enhance(1 + 0.9 * signed)


def by_pillow(magnitude, sign, width, height):
    signed = magnitude * sign
    return {
        "identity": lambda image: image,
        "shear_x": affine(1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": affine(1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": affine(1, 0, 150 / 331 * width * signed, 0, 1, 0),
        "translate_y": affine(1, 0, 0, 0, 1, 150 / 331 * height * signed),
        "rotate": lambda image: image.rotate(30 * signed, Image.Resampling.BILINEAR),
        "brightness": enhance(ImageEnhance.Brightness, signed),
        "saturation": enhance(ImageEnhance.Color, signed),
        "contrast": enhance(ImageEnhance.Contrast, signed),
        "sharpness": enhance(ImageEnhance.Sharpness, signed),
        "posterize": lambda image: ImageOps.posterize(image, 8 - round(4 * magnitude)),
        "solarize": lambda image: ImageOps.solarize(image, 255 * (1 - magnitude)),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
    }


def smooth_image(height, width):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + k) * np.cos(y / 9 - k) * 0.4 + 0.45 + 0.05 * k for k in range(3)]
    return (np.stack(waves, axis=-1) * 255).astype(np.uint8)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [0.3, 1.0])
def test_each_operation_of_the_policies_is_that_of_pillow(magnitude, sign):
    height, width = 40, 56
    pixels = smooth_image(height, width)
    expected_by_name = by_pillow(magnitude, sign, width, height)
    assert set(policies._OPERATIONS) == set(expected_by_name)
    count = len(policies._OPERATIONS)
    draws = torch.stack(((torch.arange(count) + 0.5) / count, torch.full((count,), 0.5 + sign / 4)), dim=1)
    images = (torch.from_numpy(pixels).permute(2, 0, 1) / 255).repeat(count, 1, 1, 1)
    ranges = policies._Ranges(0.3, (150 / 331 * width, 150 / 331 * height), 30, 0.9, 4)
    results = policies._operate_(images, draws, torch.full((count,), magnitude), ranges)
    whites = policies._operate_(torch.ones_like(images), draws, torch.full((count,), magnitude), ranges)
    for name, result, white in zip(policies._OPERATIONS, results, whites, strict=True):
        expected = np.asarray(expected_by_name[name](Image.fromarray(pixels)), dtype=np.float64)
        error = np.abs(result.permute(1, 2, 0).numpy() * 255 - expected)
        if name in policies._GEOMETRY:  # between the image and the black, Pillow does not interpolate
            inside = white[0].numpy() > 0.9999
            assert inside.mean() > 0.5
            assert (expected[inside] > 0).all()
            assert (expected[white[0].numpy() == 0] == 0).all()
            error = error[inside]
        assert error.max() < 2, name


def test_randaugment_takes_each_operation_and_sign_equally_often():
    count, operations = 1400, len(policies._OPERATIONS)
    image = torch.from_numpy(smooth_image(20, 20)).permute(2, 0, 1) / 255
    candidates = []
    for sign in (0.25, 0.75):
        draws = torch.stack(((torch.arange(operations) + 0.5) / operations, torch.full((operations,), sign)), dim=1)
        ranges = policies._Ranges(0.3, (150 / 331 * 20, 150 / 331 * 20), 30, 0.9, 4)
        images = image.repeat(operations, 1, 1, 1)
        candidates.append(policies._operate_(images, draws, torch.full((operations,), 9 / 30), ranges))
    results = RandAugment(1, 9)(image.repeat(count, 1, 1, 1), keys_of(count), 0)
    same = (results[:, None].flatten(2) == torch.stack(candidates, dim=1).flatten(0, 1)[None].flatten(2)).all(dim=2)
    by_operation = same.reshape(count, operations, 2).sum(dim=0)  # [operations, 2]
    for name, (minus, plus) in zip(policies._OPERATIONS, by_operation.tolist(), strict=True):
        if name in policies._GEOMETRY or name in policies._ENHANCE:
            assert 25 < minus < 80, name
            assert 25 < plus < 80, name
        else:
            assert minus == plus
            assert 65 < minus < 140, name


def test_trivialaugment_takes_one_operation_of_every_magnitude():
    image = torch.full((3000, 1, 1, 1), 0.5)  # on which only brightness and solarize show
    values = TrivialAugmentWide(num_magnitude_bins=5)(image, keys_of(3000), 0).flatten()
    brightness = 0.5 * (1 + 0.99 * torch.arange(-4, 5) / 4)
    counts = torch.isclose(values[:, None], brightness).sum(dim=0)
    assert (counts[[0, 1, 2, 3, 5, 6, 7, 8]] > 8).all()  # 21 of each expected


def test_erasing_paints_a_box_of_the_areas_and_aspect_ratios_asked_for():
    count, side = 2000, 60
    images = torch.full((count, 3, side, side), 0.25)
    erased = RandomErasing(0.4, (0.05, 0.2), (0.5, 2.0), value=1.0)(images, keys_of(count), 0) == 1  # [B, C, H, W]
    assert torch.equal(erased[:, 0], erased[:, 2])
    rows, columns = erased[:, 0].any(dim=2), erased[:, 0].any(dim=1)  # [B, H], [B, W]
    assert torch.equal(erased[:, 0], rows[:, :, None] & columns[:, None])  # a box
    h, w = rows.sum(dim=1).float(), columns.sum(dim=1).float()
    found = h > 0
    assert abs(found.float().mean() - 0.4) < 0.04
    share, aspect = (h * w)[found] / side**2, (w / h)[found]
    assert 0.047 < share.min() < 0.055
    assert 0.195 < share.max() < 0.21
    assert abs(share.mean() - 0.125) < 0.005
    assert 0.47 < aspect.min() < 0.55
    assert 1.8 < aspect.max() < 2.15
    assert abs(aspect.log().mean()) < 0.05
    top = rows[found].to(torch.uint8).argmax(dim=1)
    assert top.min() == 0
    assert (top + h[found]).max() == side


def test_erasing_noise_is_uniform_and_of_each_pixel_and_channel():
    images = torch.full((50, 3, 30, 30), 2.0)
    result = RandomErasing(1.0)(images, keys_of(50), 0)
    noise = result[result != 2]
    assert len(noise) > 5000
    assert len(noise.unique()) > 0.99 * len(noise)
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.std() - 12**-0.5) < 0.01
    assert (result[:, 0] != result[:, 1])[result[:, 0] != 2].all()


def test_erasing_leaves_a_image_in_which_no_box_fits():
    images = torch.full((8, 1, 1, 40), 0.5)
    assert torch.equal(RandomErasing(1.0, (0.9, 1.0), (0.3, 3.3), value=0.0)(images, keys_of(8), 0), images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandAugment(num_ops=0), "--data.augment: RandAugment num_ops is 0, but must be in 1 to 14"),
        (lambda: RandAugment(magnitude=31), "RandAugment magnitude is 31, but must be in 0 to 30"),
        (lambda: RandAugment(num_magnitude_bins=1), "RandAugment num_magnitude_bins is 1"),
        (lambda: augment(random_images(1, (4, 9, 9)), keys_of(1), [RandAugment()]), "1 or 3 channels, not 4"),
        (lambda: TrivialAugmentWide(num_magnitude_bins=1), "TrivialAugmentWide num_magnitude_bins is 1"),
        (lambda: RandomErasing(p=1.5), "RandomErasing p is 1.5"),
        (lambda: RandomErasing(scale=(0.5, 0.2)), "RandomErasing scale is"),
        (lambda: RandomErasing(value="random"), "RandomErasing value is 'random', but must be noise, or a number in"),
        (lambda: RandomErasing(value=2.0), "RandomErasing value is 2.0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        make()
