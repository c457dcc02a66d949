"""Decoding of one image's bytes or pixels to the array that a net takes as input.

In evaluation the shorter edge is resized to R pixels and the central S x S pixels are cropped (Krizhevsky, Sutskever and
Hinton 2012, section 2). Resampling is bilinear with antialiasing, as in torchvision's reference recipes, in Pillow's
8-bit arithmetic; only the cropped pixels are computed. If the sizes already agree, pixels are copied.

A large JPEG is decoded at 1/2, 1/4 or 1/8 of its size (by fewer coefficients of its discrete cosine transform), as long
as that leaves `DRAFT_MARGIN` times the requested pixels along each edge.

Transparent pixels are drawn over white, the orientation in EXIF is applied, and only the first frame of an animation is
read. Embedded ICC profiles and gamma are not applied, as usual in training recipes.

H and W pixels of an upright image, C channels (1: grey, 3: RGB), S and R as above.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 2**27
DRAFT_MARGIN = 1.5  # on photographs, at least 41 dB from full decoding; 1 gives 35

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

# Recognized by their first bytes. Formats without a signature (TGA), or that run a program (EPS), are excluded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {  # transposition that makes an image of this orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_pillow_limit = threading.Lock()


class ImageError(ValueError):
    """Error for an unusable image. The message gives the reason; the caller adds the name."""


@dataclass(frozen=True)
class Geometry:
    """Output format of decoded images.

    Attributes:
        channels: 1 or 3.
        size: S, edge of the net's square input [pixels].
        resize: R, size of the shorter edge before S x S pixels are cropped [pixels].
        max_pixels: an image with more is rejected before it is decoded.
    """

    channels: int
    size: int
    resize: int
    max_pixels: int = MAX_PIXELS

    def decode(self, content: bytes | np.ndarray | Image.Image, box: Box | None = None) -> np.ndarray:
        """Return the pixels [S, S, C] uint8 of the box, by default of the centre.

        Args:
            content: bytes of an image file, or pixels; see `open_image`.
            box: the region that is resized to S x S, in pixels of the upright original, within it.

        Raises:
            ImageError: if the content is not an image, is damaged, too large, or does not contain the box.
        """
        with _errors():
            image = open_image(content, self.max_pixels)
            width, height = upright_size(image)
            left, top, right, bottom = box or self._middle(width, height)
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                raise ImageError(f"box {box} does not lie within the {width} x {height} pixels of the image")
            image, scale = _pixels(image, self._mode, min(right - left, bottom - top) / self.size)
            reduced = (left / scale, top / scale, right / scale, bottom / scale)
            return self._array(_resample(image, (self.size, self.size), reduced))

    def decode_whole(self, content: bytes | np.ndarray) -> np.ndarray:
        """Return the whole image, [H', W', C] uint8 with H' and W' by `whole_sizes`.

        Arguments and errors as for `decode`.
        """
        with _errors():
            image = open_image(content, self.max_pixels)
            width, height = upright_size(image)
            new_width, new_height = self.whole_sizes(np.array([width, height])).tolist()
            image, scale = _pixels(image, self._mode, min(width / new_width, height / new_height))
            return self._array(_resample(image, (new_width, new_height), (0, 0, width / scale, height / scale)))

    def whole_sizes(self, sizes: np.ndarray) -> np.ndarray:
        """Return the edges of images, [..., 2], after resizing the shorter one to R, without enlarging."""
        shorter = sizes.min(-1, keepdims=True)
        return np.where(shorter <= self.resize, sizes, self.resize * sizes.astype(np.int64) // shorter)

    def _middle(self, width: int, height: int) -> Box:
        """Return the box whose resizing to S x S equals resizing the whole and cropping the centre."""
        shorter = min(width, height)
        new_width, new_height = self.resize * width // shorter, self.resize * height // shorter
        x, y = width / new_width, height / new_height
        left, top = round((new_width - self.size) / 2), round((new_height - self.size) / 2)
        return left * x, top * y, min((left + self.size) * x, width), min((top + self.size) * y, height)

    @property
    def _mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def _array(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image).reshape(image.height, image.width, self.channels)


def decode(
    image: bytes | np.ndarray | Image.Image | str | os.PathLike[str],
    *,
    channels: int,
    size: int,
    resize: int,
) -> np.ndarray:
    """Return the pixels [S, S, C] uint8 of a single image or path, see `Geometry` and its `decode`.

    Raises:
        ValueError: if the image cannot be used.
        OSError: if the file cannot be read.
    """
    geometry = Geometry(channels, size, resize)
    if not isinstance(image, str | os.PathLike):
        return geometry.decode(image)
    try:
        return geometry.decode(Path(image).read_bytes())
    except ImageError as error:
        raise ImageError(f"{os.fspath(image)}: {error}") from error


def measure(content: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> tuple[int, int, bool]:
    """Return height and width of the upright image, and True if all its pixels are grey.

    Reads all data, so damage is detected.

    Raises:
        ImageError: as `Geometry.decode`.
    """
    with _errors():
        image = open_image(content, max_pixels)
        width, height = upright_size(image)
        image, _ = _pixels(image, None, 8 * DRAFT_MARGIN)
        red, *others = image.split()
        return height, width, all(red.tobytes() == other.tobytes() for other in others)


def open_image(content: bytes | np.ndarray | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return an image with its header read, its pixels not decoded yet.

    Args:
        content: bytes of a file in one of the usual formats, independent of its name; or pixels [H, W] or [H, W, C] of
            uint8 or uint16 (the upper 8 bits are used), C of 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha); or a
            Pillow image, which is not modified.
        max_pixels: a file with more is rejected.

    Raises:
        ImageError: if it is not an image, or too large.
    """
    if isinstance(content, np.ndarray):
        return _from_array(content)
    if isinstance(content, Image.Image):
        return content.copy()
    if not content:
        raise ImageError("the file is empty")
    with _pillow_limit:  # Pillow's own limit is global, not settable per call
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(content), formats=_formats())
        except Image.UnidentifiedImageError:
            raise ImageError(f"the file is not an image in an accepted format ({', '.join(_formats())})") from None
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{image.width:,} x {image.height:,} pixels are more than the {max_pixels:,} of --data.max_pixels"
        )
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened image in upright orientation."""
    return (image.height, image.width) if _orientation(image) in _SIDEWAYS else (image.width, image.height)


@contextmanager
def _errors() -> Iterator[None]:
    """Convert any exception of Pillow and its libraries to an `ImageError`; ignore their warnings."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(f"the image cannot be decoded ({type(error).__name__}: {error})") from error


@cache
def _formats() -> tuple[str, ...]:
    """Return the formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
        raise ImageError(f"pixels are {pixels.dtype}; uint8 and uint16 can be read")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and 1 <= pixels.shape[2] <= 4)) or 0 in pixels.shape:
        raise ImageError(f"pixels have shape {list(pixels.shape)}; [H, W] and [H, W, C] with C from 1 to 4 can be read")
    if pixels.dtype.itemsize == 2:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(pixels)


def _orientation(image: Image.Image) -> int:
    """Return the orientation, from 1 (upright) to 8; 1 if EXIF cannot be read."""
    if image.format == "TIFF":  # Pillow rotates these itself
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1


def _pixels(image: Image.Image, mode: str | None, shrink: float) -> tuple[Image.Image, int]:
    """Return the upright image in `mode` (None: L or RGB as it is), and the factor by which its edges were divided.

    Args:
        image: opened, not decoded.
        mode: L or RGB.
        shrink: the maximum factor, apart from the margin.
    """
    turn = _TURNS.get(_orientation(image))
    scale = max(s for s in (1, 2, 4, 8) if s == 1 or s * DRAFT_MARGIN <= shrink)
    if image.draft(mode or "RGB", (max(1, image.width // scale), max(1, image.height // scale))) is None:
        scale = 1
    image.load()
    image = _flat(image)
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    return (image if turn is None else image.transpose(turn)), scale


def _flat(image: Image.Image) -> Image.Image:
    """Return the same image in L or RGB."""
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"pixels range from {values.min()} to {values.max()}; integers from 0 to 65535 can be read")
    if "transparency" in image.info:
        values = np.where(values == image.info["transparency"], 65535, values)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not ((values >= 0) & (values <= 1)).all():
        raise ImageError(
            f"pixels are 32-bit floats from {values.min():g} to {values.max():g}; floats are read as 0 (black) to 1 (white):"
            " scale them, or store 8 or 16 bits"
        )
    return Image.fromarray((values * 255 + 0.5).astype(np.uint8))


def _resample(image: Image.Image, size: tuple[int, int], box: Box) -> Image.Image:
    """Resample the box of an image to width x height pixels."""
    left, top, right, bottom = box
    if (right - left, bottom - top) == size and left == int(left) and top == int(top):
        return image.crop((int(left), int(top), int(right), int(bottom)))
    within = (left, top, min(right, image.width), min(bottom, image.height))  # rounding may exceed the edge
    return image.resize(size, Image.Resampling.BILINEAR, box=within)
