"""Encoded images to 8-bit RGB pictures, in one documented way.

- Orientation in EXIF is honoured; an invalid one is ignored.
- Gray and 1-bit are repeated into three channels, palettes are looked up, CMYK and YCbCr go
  through Pillow's own conversion. ICC profiles are not applied.
- 16-bit gray is scaled by 255/65535 and rounded, 12-bit by 255/4095; 16-bit RGB likewise, by Pillow.
- Alpha is composited over white: the ground on which browsers, documents and shops show such
  pictures. What lies hidden under full transparency never shows.
- Floating-point pixels, signed integers and those beyond 16 bits are refused: their range is unknown.
- Of animations and many-page files the first picture is used.
"""

import importlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from featurex_ray.errors import DecodeError
from featurex_ray.media.limits import DEFAULT_LIMITS, MediaLimits
from featurex_ray.media.preprocess import InputSpec, fit
from featurex_ray.media.sniff import Buffer, BufferReader, sniff

_PLUGINS = {
    "jpeg": ["JPEG", "MPO"],
    "png": ["PNG"],
    "webp": ["WEBP"],
    "gif": ["GIF"],
    "bmp": ["BMP"],
    "tiff": ["TIFF"],
    "ico": ["ICO"],
    "ppm": ["PPM"],
    "jpeg2000": ["JPEG2000"],
    "avif": ["AVIF"],
    "tga": ["TGA"],
}
"""The only Pillow plugins that ever see the bytes, by sniffed format."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, 1

_MARGIN = 2.75
"""By how much a JPEG decoded at reduced scale is still too large. Measured with MobileNetV2 and
SqueezeNet on photographs, against full decode: cosine >= 0.9993 (at 2.0: 0.9986)."""

_SMALL_INPUT = 96
"""Inputs below this many pixels a side are treated as this large: they feel the change more."""

_APP1 = b"\xff\xe1"
"""Begins a JPEG's EXIF and XMP; in its pixels it can't stand, elsewhere only by chance."""

_COPIED_BYTES = 1 << 20
_PLAIN_PIXELS = 4_000_000
_BAND_PIXELS = 1 << 20

# All that Pillow's parsers were seen to raise on damaged files.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    MemoryError,
    EOFError,
    struct.error,
    zlib.error,
)

# Pillow warns of odd EXIF and large pictures. Decoding runs in threads, where
# `warnings.catch_warnings` would race, so the filter is set once for its module.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow logs some of what it raises; without any handler Python prints that.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class DecodedImage:
    """One picture, fitted to each input that was asked for.

    Args:
        frames: One (H, W, 3) uint8 RGB array per `InputSpec`.
        width: Of the source in pixels, upright.
        height: Of the source in pixels, upright.
        complete: Whether all of it was read. Always: a broken-off image is an error.
    """

    frames: tuple[np.ndarray, ...]
    width: int
    height: int
    complete: bool = True


def decode_image(
    data: Buffer,
    *,
    inputs: Sequence[InputSpec],
    limits: MediaLimits = DEFAULT_LIMITS,
    full_decode: bool = False,
) -> DecodedImage:
    """Decode an image for one or several models.

    A JPEG much larger than needed is decoded at a half, a quarter or an eighth, always at least
    2.75 times as large as any input needs.

    Args:
        data: The encoded image.
        inputs: What the models want; at least one.
        limits: Larger pictures are refused before they are decoded.
        full_decode: Never decode at reduced scale.

    Raises:
        ProbeError: `empty` or `unsupported_container`.
        DecodeError: `truncated`, `undecodable`, `too_large` or `unsupported_codec`.
    """
    container = sniff(data)
    if container.media_type != "image":
        raise DecodeError("unsupported_codec", f"a {container.format} video, not an image")
    if container.format == "jpeg":
        pixels = _plain_jpeg(data, inputs, limits, full_decode=full_decode)
        if pixels is not None:
            frames = tuple(fit(pixels, spec) for spec in inputs)
            return DecodedImage(frames, width=pixels.shape[1], height=pixels.shape[0])
    try:
        image = Image.open(_reader(data), formats=_PLUGINS[container.format])
        width, height = image.size
        limits.check_size(width, height)
        limits.check_ratio(num_pixels=width * height, num_bytes=len(data))
        if not full_decode:
            _reduce(image, inputs)
        _fit_transparency(image)
        image.load()
        orientation = _orientation(image)
        upright = _upright(_to_rgb(image), orientation)
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise DecodeError("undecodable", f"unreadable {container.format} header") from error
    except _PILLOW_ERRORS as error:
        raise _decode_error(error) from error
    if orientation >= 5:
        width, height = height, width
    return DecodedImage(tuple(fit(upright, spec) for spec in inputs), width, height)


def load_plugins() -> None:
    """Import all that decoding may need now, so that nothing has to be opened later."""
    Image.init()
    for name in ("ImageCms", "ImageColor", "ImageFile", "ImageFilter", "ImagePalette", "ImageSequence"):
        importlib.import_module(f"PIL.{name}")


def set_bomb_check(limits: MediaLimits) -> None:
    """Have Pillow itself refuse larger pictures in this process, those inside of others (ICO) too."""
    Image.MAX_IMAGE_PIXELS = limits.max_pixels // 2  # it warns of more, and refuses twice as much


def _plain_jpeg(
    data: Buffer, inputs: Sequence[InputSpec], limits: MediaLimits, *, full_decode: bool
) -> np.ndarray | None:
    """A small JPEG's pixels without Pillow, whose header parser takes longer than they do.

    Both have them from a libjpeg-turbo of their own; tests hold one to the other.

    Returns:
        (H, W, 3) uint8, RGB; None where it takes Pillow: for orientation (EXIF or XMP), CMYK, decoding at
        reduced scale, large pictures, which would be there twice, and whatever is damaged.
    """
    if len(data) > _COPIED_BYTES or _APP1 in (encoded := bytes(data)):
        return None
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(encoded)
        if colour not in ("YCbCr", "Gray") or width * height > _PLAIN_PIXELS:
            return None
        if not full_decode and _scale(inputs, width, height) > 1:
            return None
        limits.check_size(width, height)
        limits.check_ratio(num_pixels=width * height, num_bytes=len(encoded))
        pixels: np.ndarray = simplejpeg.decode_jpeg(encoded, "RGB")
    except (ValueError, LookupError, RuntimeError):  # what it was seen to raise; 4:4:1 is a KeyError
        return None
    except MemoryError as error:
        raise _decode_error(error) from error
    return pixels


def _reader(data: Buffer) -> BinaryIO:
    """A file over the bytes; a copy where that is cheaper than Pillow's many small reads in Python."""
    return io.BytesIO(data) if len(data) <= _COPIED_BYTES else cast(BinaryIO, BufferReader(data))


def _reduce(image: Image.Image, inputs: Sequence[InputSpec]) -> None:
    """Have libjpeg decode at 1/2, 1/4 or 1/8 of its size, where that leaves enough for every input."""
    scale = _scale(inputs, *image.size)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))


def _scale(inputs: Sequence[InputSpec], width: int, height: int) -> int:
    # EXIF may yet swap the sides: take the way around that needs more.
    sides = ((width, height), (height, width))
    reduction = min(_reduction(spec, *size) for spec in inputs for size in sides)
    return next((scale for scale in (8, 4, 2) if scale * _MARGIN <= reduction), 1)


def _reduction(spec: InputSpec, width: int, height: int) -> float:
    """How many source pixels make one input pixel, were the input not smaller than `_SMALL_INPUT`."""
    side = spec.resize or min(spec.height, spec.width)
    return spec.reduction(width, height) * min(1.0, side / _SMALL_INPUT)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION)
    except _PILLOW_ERRORS:
        return 1  # EXIF that can't be read says nothing
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


_TRANSPARENCY: dict[str, Callable[[Any], Any]] = {
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: tuple(part >> 8 for part in value),
}
"""By how a PNG's pixels are packed: its transparent value, which counts as they do, in Pillow's 8 bits."""


def _fit_transparency(image: Image.Image) -> None:
    value = image.info.get("transparency")
    if image.format == "PNG" and value is not None and isinstance(image, ImageFile.ImageFile) and image.tile:
        packed = image.tile[0].args
        if isinstance(packed, str) and packed in _TRANSPARENCY:
            image.info["transparency"] = _TRANSPARENCY[packed](value)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(image).convert("RGB")
    if image.mode == "F":
        raise DecodeError("unsupported_codec", "floating-point pixels have no known range")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Composite over white, band by band: the steps between would take four times the memory."""
    flat = Image.new("RGB", image.size)
    for box in _bands(image):
        band = image.crop(box).convert("RGBA")
        ground = Image.new("RGBA", band.size, "white")
        flat.paste(Image.alpha_composite(ground, band).convert("RGB"), box)
    return flat


def _from_integers(image: Image.Image) -> Image.Image:
    """12 and 16-bit gray, which Pillow holds as `I;16*` or `I`, to 8 bits by scaling."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    num_bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if num_bits > 16 or tags.get(_SAMPLE_FORMAT, (1,))[0] != _UNSIGNED:
        raise DecodeError(
            "unsupported_codec", "integer pixels beyond 16 bits, or signed, have no known range"
        )
    white = (1 << num_bits) - 1
    hidden = image.info.get("transparency")
    flat = Image.new("L", image.size)
    for box in _bands(image):
        values = np.asarray(image.crop(box)).astype(np.int64)
        if values.min() < 0 or values.max() > white:
            raise DecodeError("unsupported_codec", "integer pixels beyond 16 bits have no known range")
        gray = (values * 255 + white // 2) // white
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            gray = 255 - gray
        if isinstance(hidden, int):
            gray[values == hidden] = 255
        flat.paste(Image.fromarray(gray.astype(np.uint8)), box)
    return flat


def _bands(image: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes that cover a picture from top to bottom, of about a million pixels each."""
    rows = max(_BAND_PIXELS // max(image.width, 1), 1)
    return [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]


def _decode_error(error: Exception) -> DecodeError:
    if isinstance(error, MemoryError):
        return DecodeError("too_large", f"out of memory {error}".rstrip())
    text = str(error) or type(error).__name__
    return DecodeError("truncated" if "truncated" in text.lower() else "undecodable", text)
