"""Crops, mirror images and affine maps: against numpy, Pillow, a loop over pixels and the published algorithm."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from bigmodel.data.stateless_rng import sample_keys, uniform
from bigmodel.tasks.image_classification.geometry import RandomAffine, RandomCrop, RandomFlip, RandomResizedCrop, warp


def keys_of(count):
    return torch.from_numpy(sample_keys(3, 0, np.arange(count)))


def random_images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect"), ("edge", "edge")])
def test_a_crop_is_a_window_of_the_padded_image_and_every_window_is_as_likely(mode, numpy_mode):
    count, padding, height, width = 2500, 2, 5, 7
    images = random_images(count, 3, height, width)
    cropped = RandomCrop(padding, mode)(images, keys_of(count), 0)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)), mode=numpy_mode)
    windows = [padded[:, :, i : i + height, j : j + width] for i in range(5) for j in range(5)]
    same = (np.stack(windows) == cropped.numpy()).all(axis=(2, 3, 4))  # [25, B]
    assert (same.sum(axis=0) == 1).all()
    assert same.sum(axis=1).min() > 60
    assert same.sum(axis=1).max() < 145


@pytest.mark.parametrize(("vertical", "axis"), [(False, 3), (True, 2)])
def test_the_share_asked_for_is_mirrored(vertical, axis):
    images = random_images(2000, 1, 4, 6)
    flipped = RandomFlip(0.3, vertical)(images, keys_of(2000), 0)
    mirrored = (flipped == images.flip(axis)).flatten(1).all(dim=1)
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert abs(mirrored.float().mean() - 0.3) < 0.04
    assert torch.equal(RandomFlip(0.0)(images, keys_of(2000), 0), images)
    assert torch.equal(RandomFlip(1.0, vertical)(images, keys_of(2000), 0), images.flip(axis))


def bilinear(image, matrix, border):
    """One channel [H, W] through a 2 x 3 matrix, pixel by pixel."""
    height, width = image.shape

    def pixel(i, j):
        if border:
            return image[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
        return image[i, j] if 0 <= i < height and 0 <= j < width else 0.0

    result = np.empty_like(image)
    for i in range(height):
        for j in range(width):
            x, y = matrix @ (j - (width - 1) / 2, i - (height - 1) / 2, 1)
            x, y = x + (width - 1) / 2, y + (height - 1) / 2
            if border:
                x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
            a, b = math.floor(y), math.floor(x)
            v, u = y - a, x - b
            result[i, j] = (1 - v) * ((1 - u) * pixel(a, b) + u * pixel(a, b + 1))
            result[i, j] += v * ((1 - u) * pixel(a + 1, b) + u * pixel(a + 1, b + 1))
    return result


@pytest.mark.parametrize("outside", ["zeros", "border"])
def test_warp_is_bilinear_interpolation(outside):
    images = random_images(6, 2, 9, 12)
    matrices = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.8, 0.8, 3.0])
    warped = warp(images, matrices, outside).numpy()
    for row in range(6):
        for channel in range(2):
            matrix = matrices[row].double().numpy()
            expected = bilinear(images[row, channel].double().numpy(), matrix, outside == "border")
            np.testing.assert_allclose(warped[row, channel], expected, atol=2e-5)


def test_affine_shears_rotates_scales_and_shifts_by_what_was_drawn():
    count, height, width = 5, 8, 11
    images, keys = random_images(count, 1, height, width), keys_of(count)
    moved = RandomAffine(40, 0.25, (0.7, 1.4), 25)(images, keys, 7)
    draws = uniform(keys.numpy(), 7, 5).astype(np.float64)
    for row in range(count):
        rotated, sheared, scaled, right, down = draws[row]
        angle, slope = math.radians(40 * (2 * rotated - 1)), math.tan(math.radians(25 * (2 * sheared - 1)))
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        forward = np.eye(3)
        forward[:2, :2] = (0.7 + 0.7 * scaled) * rotation @ [[1, slope], [0, 1]]
        forward[:2, 2] = 0.25 * width * (2 * right - 1), 0.25 * height * (2 * down - 1)
        expected = bilinear(images[row, 0].double().numpy(), np.linalg.inv(forward)[:2], border=False)
        np.testing.assert_allclose(moved[row, 0].numpy(), expected, atol=2e-5)


def test_a_positive_angle_turns_counterclockwise_as_in_pillow():
    images, keys = random_images(4, 1, 21, 21), keys_of(4)
    rotated = RandomAffine(90)(images, keys, 0)
    for row, draw in enumerate(uniform(keys.numpy(), 0, 5)[:, 0]):
        image = Image.fromarray(images[row, 0].numpy())
        expected = np.asarray(image.rotate(90 * (2 * float(draw) - 1), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(rotated[row, 0, 6:15, 6:15].numpy(), expected[6:15, 6:15], atol=2e-4)


def test_an_affine_map_of_nothing_changes_nothing():
    images = random_images(4, 3, 32, 28)
    torch.testing.assert_close(RandomAffine()(images, keys_of(4), 0), images, atol=1e-5, rtol=0)


def published_box(height, width, scale, ratio, areas, ratios, left, top):
    """Ten tries, then the centre; the random numbers are given."""
    for for_area, for_ratio in zip(areas, ratios, strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * for_area)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * for_ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = math.floor(left * (width - w + 1)), math.floor(top * (height - h + 1))
            return (x, y, x + w, y + h), True
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    x, y = (width - w) // 2, (height - h) // 2
    return (x, y, x + w, y + h), False


@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.7, 1.0), (0.9, 1.1))])
def test_boxes_are_those_of_the_published_algorithm(scale, ratio):
    count = 600
    shapes = np.random.default_rng(0).integers(1, 400, (count, 2))
    keys = keys_of(count).numpy()
    boxes = RandomResizedCrop(scale, ratio).boxes(shapes, keys)
    tries, places = uniform(keys, 0, 20).astype(np.float64), uniform(keys, 1, 2).astype(np.float64)
    found = 0
    for row, (height, width) in enumerate(shapes.tolist()):
        draws = tries[row, :10], tries[row, 10:], *places[row]
        expected, by_trying = published_box(height, width, scale, ratio, *draws)
        assert boxes[row].tolist() == list(expected)
        found += by_trying
    assert 0 < found < count  # both ways were taken
    assert boxes.dtype == np.float64


def test_boxes_of_large_images_have_the_areas_aspect_ratios_and_places_asked_for():
    count = 4000
    boxes = RandomResizedCrop((0.2, 0.4), (0.5, 2.0)).boxes(np.full((count, 2), 1000), keys_of(count).numpy())
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share, aspect = w * h / 1e6, np.log(w / h)
    assert abs(share.mean() - 0.3) < 0.005
    assert abs(share.std() - 0.2 / 12**0.5) < 0.003
    assert abs(aspect.mean()) < 0.03
    assert abs(aspect.std() - math.log(4) / 12**0.5) < 0.02
    place = boxes[:, 0] / (1000 - w)
    assert abs(place.mean() - 0.5) < 0.02
    assert abs(place.std() - 12**-0.5) < 0.01


def test_an_image_has_the_same_box_in_any_company():
    shapes, keys = np.random.default_rng(0).integers(20, 400, (50, 2)), keys_of(50).numpy()
    crop = RandomResizedCrop()
    alone = np.concatenate([crop.boxes(shapes[i : i + 1], keys[i : i + 1]) for i in range(50)])
    np.testing.assert_array_equal(crop.boxes(shapes, keys), alone)


def test_a_crop_of_a_batch_enlarges_the_box_as_pillow_does():
    height, width = 24, 32
    images, keys = random_images(8, 1, height, width), keys_of(8)
    crop = RandomResizedCrop((0.1, 0.8))
    boxes = crop.boxes(np.full((8, 2), (height, width)), keys.numpy())
    enlarged = crop(images, keys, 0)  # stream 0 is that of the boxes
    for row, box in enumerate(boxes.tolist()):
        image = Image.fromarray(images[row, 0].numpy())
        expected = image.transform((width, height), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(enlarged[row, 0].numpy(), np.asarray(expected), atol=2e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(-1), "--data.augment: RandomCrop padding is -1 pixels, but must be 0 or more"),
        (lambda: RandomCrop(2, "wrap"), "mode is 'wrap', but must be one of zero, reflect, edge"),
        (
            lambda: RandomCrop(7, "reflect")(random_images(1, 1, 7, 9), keys_of(1), 0),
            "padding 7 is too large to reflect images of 7 x 9",
        ),
        (lambda: RandomFlip(-0.1), "RandomFlip p is -0.1"),
        (lambda: RandomAffine(degrees=200), "degrees is 200"),
        (lambda: RandomAffine(translate=2), "translate is 2"),
        (lambda: RandomAffine(scale=(0, 1)), "scale is .0, 1., but must be .min, max., both above 0"),
        (lambda: RandomAffine(shear=90), "shear is 90"),
        (lambda: RandomResizedCrop(scale=(0.5, 1.5)), "--data.augment or --data.crop: RandomResizedCrop scale is"),
        (lambda: RandomResizedCrop(ratio=(2, 1)), "ratio is .2, 1."),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
