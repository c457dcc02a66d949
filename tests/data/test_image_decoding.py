"""Images of every kind become the right pixels, whole and unharmed, and what is no image is refused."""

import io
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from bigmodel.data import image_decoding as module
from bigmodel.data.image_decoding import Geometry, ImageError, decode, measure

DRAW = np.random.default_rng(0)
NOISE = DRAW.integers(0, 256, (6, 8, 3), np.uint8)  # [H, W, RGB]
GREY = NOISE[:, :, 0]


def smooth(height, width, seed=0):
    """An image [H, W, 3] that survives JPEG."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def file_of(image, kind, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def whole(content, channels=3):
    return Geometry(channels, 1, 10**6).decode_whole(content)


def over_white(rgb, alpha):
    alpha = alpha[..., None] / 255
    return np.round(rgb * alpha + 255 * (1 - alpha))


# Every mode of image


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF"])
def test_lossless_formats_come_out_as_they_went_in(kind):
    image = Image.fromarray(NOISE)
    if kind == "GIF":
        image = image.quantize(256)
    content = file_of(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(whole(content), np.asarray(image.convert("RGB")))


def test_bilevel():
    content = file_of(Image.fromarray(GREY > 128), "PNG")
    pixels = whole(content, 1)[:, :, 0]
    np.testing.assert_array_equal(pixels, np.where(GREY > 128, 255, 0))
    assert measure(content) == (6, 8, True)


def test_grey_and_colour_convert_to_each_other():
    np.testing.assert_array_equal(whole(file_of(GREY, "PNG")), np.repeat(GREY[:, :, None], 3, 2))
    luma = NOISE @ [0.299, 0.587, 0.114]
    assert np.abs(whole(file_of(NOISE, "PNG"), 1)[:, :, 0] - luma).max() < 0.51


def test_palette():
    image = Image.fromarray(NOISE).quantize(16)
    np.testing.assert_array_equal(whole(file_of(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparent", [3, bytes(range(0, 256, 16))], ids=["one index", "an alpha per index"])
def test_palette_with_transparency_lies_over_white(transparent):
    image = Image.fromarray(NOISE).quantize(16)
    table = np.full(16, 255)
    if isinstance(transparent, int):
        table[transparent] = 0
    else:
        table[:] = list(transparent)
    pixels = whole(file_of(image, "PNG", transparency=transparent))
    expected = over_white(np.asarray(image.convert("RGB")), table[np.asarray(image)])
    assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "RGBa"])
def test_alpha_lies_over_white(mode):
    alpha = DRAW.integers(0, 256, (6, 8), np.uint8)
    image = Image.merge("RGBA", [*Image.fromarray(NOISE).split(), Image.fromarray(alpha)])
    base = np.asarray(Image.fromarray(NOISE).convert("L").convert("RGB")) if mode == "LA" else NOISE
    if mode == "PA":
        palette = Image.fromarray(NOISE).quantize(64)
        image = palette.convert("PA")
        image.putalpha(Image.fromarray(alpha))
        base = np.asarray(palette.convert("RGB"))
    else:
        image = image.convert(mode)
    tolerance = 2 if mode == "RGBa" else 1  # premultiplied colours lose a bit
    assert np.abs(whole(image) - over_white(base, alpha)).max() <= tolerance


def test_alpha_of_arrays_lies_over_white():
    alpha = DRAW.integers(0, 256, (6, 8, 1), np.uint8)
    for colours in (NOISE, GREY[:, :, None]):
        pixels = whole(np.concatenate([colours, alpha], 2))
        assert np.abs(pixels - over_white(np.broadcast_to(colours, NOISE.shape), alpha[:, :, 0])).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_colour_key_of_png_lies_over_white(mode):
    if mode == "I;16":
        values, key = (GREY.astype(np.uint16) << 8) + 7, (int(GREY[2, 3]) << 8) + 7
        image = Image.fromarray(values)
    else:
        image = Image.fromarray(NOISE).convert(mode)
        values = np.asarray(image)
        key = image.getpixel((3, 2))
    content = file_of(image, "PNG", transparency=key)
    shown = values >> 8 if mode == "I;16" else np.asarray(image.convert("RGB"))
    hit = (values == np.array(key, values.dtype)).reshape(6, 8, -1).all(2) if mode != "1" else values == bool(key)
    expected = np.where(hit[:, :, None], 255, shown.reshape(6, 8, -1))
    np.testing.assert_array_equal(whole(content), np.broadcast_to(expected, NOISE.shape))


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpeg_is_right_side_up(adobe):
    image = smooth(64, 96)
    content = file_of(Image.fromarray(image).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in content
    if not adobe:
        start = content.index(b"\xff\xee")
        content = content[:start] + content[start + 16 :]
    pixels = whole(content).astype(int)
    assert np.abs(pixels - image).mean() < 3


def test_cmyk_tiff():
    image = Image.fromarray(NOISE).convert("CMYK")
    np.testing.assert_array_equal(whole(file_of(image, "TIFF")), np.asarray(image.convert("RGB")))


def test_ycbcr_lab_and_hsv():
    original = smooth(32, 48)
    for image in (Image.fromarray(original).convert("YCbCr"), Image.fromarray(original).convert("HSV")):
        assert np.abs(whole(image).astype(int) - original).max() <= 8
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(original), *profiles, outputMode="LAB")
    assert np.abs(whole(file_of(lab, "TIFF")).astype(int) - original).mean() < 3
    grey = whole(file_of(lab, "TIFF"), 1)[:, :, 0]
    assert np.abs(grey - original @ [0.299, 0.587, 0.114]).mean() < 3


@pytest.mark.parametrize("how", ["png", "tiff", "big endian tiff", "pgm", "int32 tiff", "array"])
def test_16_bits_keep_their_upper_half(how):
    values = DRAW.integers(0, 2**16, (6, 8), np.uint16)
    values[0, :2] = 0, 65535
    match how:
        case "png":
            content = file_of(values, "PNG")
        case "tiff":
            content = file_of(values, "TIFF")
        case "big endian tiff":
            content = Image.frombytes("I;16B", (8, 6), values.astype(">u2").tobytes())
        case "pgm":
            content = b"P5 8 6 65535\n" + values.astype(">u2").tobytes()
        case "int32 tiff":
            content = file_of(values.astype(np.int32), "TIFF")
        case "array":
            content = values
    np.testing.assert_array_equal(whole(content, 1)[:, :, 0], values >> 8)
    assert measure(content)[2]


def test_integers_beyond_16_bits_are_refused():
    with pytest.raises(ImageError, match=r"from -1 to 70000; integers from 0 to 65535"):
        whole(file_of(np.array([[-1, 70000]], np.int32), "TIFF"))


def test_floats_from_0_to_1():
    values = DRAW.random((6, 8), np.float32)
    values[0, :2] = 0, 1
    np.testing.assert_array_equal(whole(file_of(values, "TIFF"), 1)[:, :, 0], np.floor(values * 255 + 0.5))
    for bad in (255.0, -0.1, np.nan):
        values[1, 1] = bad
        with pytest.raises(ImageError, match=r"floats from .*; floats are read as 0 \(black\) to 1 \(white\)"):
            whole(file_of(values, "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in (40, 120, 200)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (whole(content) == 40).all()


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "TIFF", "TIFF with LZW", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_after_reduced_decoding(kind, orientation):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    upright = smooth(96, 160)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "TIFF with LZW": {"compression": "tiff_lzw"}}.get(kind, {})
    content = file_of(np.ascontiguousarray(undo[orientation](upright)), kind.split()[0], exif=exif, **options)
    assert measure(content)[:2] == (96, 160)
    assert whole(content).shape == (96, 160, 3)
    geometry = Geometry(3, 24, 24)
    box = (80.0, 0.0, 160.0, 60.0)
    for part in (None, box):
        expected = geometry.decode(upright, part).astype(int)
        assert np.abs(geometry.decode(content, part) - expected).mean() < (
            4 if kind in ("JPEG", "MPO", "AVIF") else 0.5
        )


def test_damaged_exif_turns_nothing_and_says_nothing():
    content = file_of(NOISE, "PNG", exif=b"Exif\0\0MM\0*\0\0")
    np.testing.assert_array_equal(whole(content), NOISE)


# Geometry


def test_equal_sizes_are_copied():
    digit = DRAW.integers(0, 256, (28, 28), np.uint8)
    np.testing.assert_array_equal(Geometry(1, 28, 28).decode(digit)[:, :, 0], digit)
    image = DRAW.integers(0, 256, (40, 60, 3), np.uint8)
    np.testing.assert_array_equal(Geometry(3, 32, 40).decode(image), image[4:36, 14:46])
    box = (5.0, 3.0, 37.0, 35.0)
    np.testing.assert_array_equal(Geometry(3, 32, 32).decode(image, box), image[3:35, 5:37])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 50), (50, 75), (200, 67), (20, 31), (21, 97)])
@pytest.mark.parametrize(("size", "resize"), [(32, 32), (32, 37), (33, 50)])
def test_middle_equals_resizing_all_and_cropping(height, width, size, resize):
    image = smooth(height, width)
    if width <= height:
        whole_size = resize, int(resize * height / width)
    else:
        whole_size = int(resize * width / height), resize
    resized = Image.fromarray(image).resize(whole_size, Image.Resampling.BILINEAR)
    left, top = round((whole_size[0] - size) / 2), round((whole_size[1] - size) / 2)
    expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
    assert np.abs(Geometry(3, size, resize).decode(image) - expected).max() <= 1  # rounding of float32 positions


def test_box_equals_pillow():
    image, box = smooth(60, 90), (10.5, 3.25, 71.0, 55.75)
    expected = Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(Geometry(3, 24, 24).decode(image, box), np.asarray(expected))


@pytest.mark.parametrize("box", [(-1, 0, 10, 10), (0, 0, 91, 10), (5, 5, 5, 10), (0, 10, 10, 9), (0, 0, 10, np.nan)])
def test_box_outside_the_image_is_refused(box):
    with pytest.raises(ValueError, match=r"does not lie within the 90 x 60 pixels"):
        Geometry(3, 8, 8).decode(smooth(60, 90), box)


def test_whole_images_are_reduced_and_never_enlarged():
    geometry = Geometry(3, 24, 30)
    assert geometry.decode_whole(smooth(60, 91)).shape == (30, 45, 3)
    assert geometry.decode_whole(smooth(91, 60)).shape == (45, 30, 3)
    small = smooth(20, 50)
    np.testing.assert_array_equal(geometry.decode_whole(small), small)


# Reduced decoding of JPEG


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(301, 450), (613, 400), (999, 1204)])
def test_reduced_decoding_is_near_to_full(monkeypatch, channels, height, width):
    content = file_of(smooth(height, width), "JPEG", quality=92)
    geometry = Geometry(channels, 90, 96)
    box = (13.5, 101.0, 13.5 + 0.8 * width, 101.0 + 0.6 * height)
    results = []
    for margin in (module.DRAFT_MARGIN, 1e9):
        monkeypatch.setattr(module, "DRAFT_MARGIN", margin)
        results.append([geometry.decode(content), geometry.decode(content, box), geometry.decode_whole(content)])
    for reduced, full in zip(*results, strict=True):
        assert reduced.shape == full.shape
        assert np.abs(reduced.astype(int) - full).mean() < 1
        assert np.abs(reduced.astype(int) - full).max() < 16


def test_reduced_image_has_at_least_half_as_many_pixels_again_as_are_asked_for(monkeypatch):
    resample, reduced = module._resample, []

    def watched(image, size, box):
        reduced.append(min(box[2] - box[0], box[3] - box[1]))
        return resample(image, size, box)

    monkeypatch.setattr(module, "_resample", watched)
    content = file_of(smooth(640, 900), "JPEG")
    for size in (20, 40, 75, 200):
        for box in ((130.0, 0.0, 770.0, 640.0), (100.0, 50.0, 800.0, 500.0), (3.0, 3.0, 203.0, 103.0)):
            Geometry(3, size, size).decode(content, box)
            assert reduced[-1] >= min(1.5 * size, min(box[2] - box[0], box[3] - box[1]))
    assert min(reduced) < 100  # some were reduced


# What is no good image


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_truncated_jpeg_is_found_by_the_scan_too(options):
    content = file_of(smooth(300, 400), "JPEG", **options)
    for share in (0.3, 0.95):
        cut = content[: int(share * len(content))]
        for read in (measure, whole):
            with pytest.raises(ImageError, match="truncated"):
                read(cut)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_file_is_refused(kind):
    content = file_of(Image.fromarray(DRAW.integers(0, 256, (64, 64, 3), np.uint8)), kind)
    with pytest.raises(ImageError):
        measure(content[: len(content) * 2 // 3])


def test_damage_is_an_error_of_one_kind():
    contents = [file_of(smooth(40, 40), kind) for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG")]
    for content in contents:
        for seed in range(40):
            draw = np.random.default_rng(seed)
            damaged = bytearray(content)
            for place in draw.integers(0, min(len(damaged), 200), 8):
                damaged[place] = draw.integers(256)
            try:
                measure(bytes(damaged), 10**6)
            except ImageError as error:
                assert str(error)  # noqa: PT017  # anything else that is raised fails the test


def test_text_is_no_image():
    with pytest.raises(ImageError, match=r"not an image in an accepted format \(JPEG, PNG"):
        measure(b"hello, I am cat.jpg\n" * 100)
    with pytest.raises(ImageError, match="the file is empty"):
        measure(b"")


def test_bomb_is_refused_by_its_header():
    header = file_of(np.zeros((1, 1), np.uint8), "PNG")
    width, height = 60_000, 50_000
    size = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + header[24:29]
    bomb = header[:12] + size + zlib.crc32(size).to_bytes(4, "big") + header[33:]
    with pytest.raises(ImageError, match=r"60,000 x 50,000 pixels are more than the 134,217,728 of --data.max_pixels"):
        measure(bomb)
    with pytest.raises(ImageError, match=r"8 x 6 pixels are more than the 47 "):
        measure(file_of(NOISE, "PNG"), 47)
    assert measure(file_of(NOISE, "PNG"), 48) == (6, 8, False)


def test_the_bound_is_ours_and_pillows_own_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings(action="error"):
        assert measure(file_of(NOISE, "PNG")) == (6, 8, False)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4), np.float32), "pixels are float32"),
        (np.zeros((4, 4), np.int64), "pixels are int64"),
        (np.zeros((4, 4, 5), np.uint8), r"shape \[4, 4, 5\]"),
        (np.zeros((0, 4), np.uint8), r"shape \[0, 4\]"),
        (np.zeros(4, np.uint8), r"shape \[4\]"),
    ],
)
def test_arrays_that_are_no_images_are_refused(pixels, message):
    with pytest.raises(ImageError, match=message):
        whole(pixels)


# Grey or not; single images


def test_grey_is_what_has_no_colour():
    grey = np.repeat(smooth(64, 64)[:, :, :1], 3, 2)
    assert measure(file_of(grey, "JPEG", quality=75))[2]
    assert measure(file_of(grey, "PNG"))[2]
    assert measure(grey)[2]
    grey = grey.copy()
    grey[33, 9] = 200, 100, 0
    assert not measure(file_of(grey, "PNG"))[2]
    assert not measure(file_of(smooth(64, 64), "JPEG"))[2]


def test_single_image_from_anywhere(tmp_path):
    content = file_of(smooth(300, 400), "JPEG")
    (tmp_path / "image.gif").write_bytes(content)  # its name lies
    image = Image.open(io.BytesIO(content))
    expected = decode(content, channels=3, size=40, resize=48)
    for path in (tmp_path / "image.gif", str(tmp_path / "image.gif")):
        np.testing.assert_array_equal(decode(path, channels=3, size=40, resize=48), expected)
    assert np.abs(decode(image, channels=3, size=40, resize=48).astype(int) - expected).mean() < 2
    assert image.size == (400, 300)
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"text.jpg: the file is not an image"):
        decode(tmp_path / "text.jpg", channels=3, size=40, resize=48)
