"""Small media of ten formats, and seeded damage to them."""

import functools
import io
from collections.abc import Callable

import av
import numpy as np
from PIL import Image

from tests.media.barcode import encoded, photograph


def _tiny_film(container: str, codec: str, **options: str) -> bytes:
    target = io.BytesIO()
    noise = np.random.default_rng(5)
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 96, 64, "yuv420p", 6
        ground = noise.integers(0, 256, (64, 128, 3), np.uint8)
        for number in range(16):
            pixels = np.ascontiguousarray(ground[:, number : number + 96])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(stream.encode(None))
    return target.getvalue()


@functools.cache
def originals() -> dict[str, bytes]:
    """One intact file a format."""
    photo = photograph(96, 64)
    return {
        "jpeg": encoded(photo, "JPEG"),
        "png": encoded(photo, "PNG"),
        "webp": encoded(photo, "WEBP"),
        "gif": encoded(photo, "GIF"),
        "tiff": encoded(photo, "TIFF", compression="tiff_lzw"),
        "avif": encoded(photo, "AVIF"),
        "mp4": _tiny_film("mp4", "libx264", preset="veryfast"),
        "webm": _tiny_film("webm", "libvpx-vp9", deadline="realtime"),
        "avi": _tiny_film("avi", "mpeg4"),
        "ts": _tiny_film("mpegts", "mpeg2video"),
    }


def _flip(data: bytearray, noise: np.random.Generator) -> None:
    for place in noise.integers(0, len(data), noise.integers(1, 20)):
        data[place] ^= 1 << noise.integers(0, 8)


def _overwrite(data: bytearray, noise: np.random.Generator) -> None:
    first = int(noise.integers(0, len(data)))
    length = int(noise.integers(1, 64))
    data[first : first + length] = noise.bytes(min(length, len(data) - first))


def _cut(data: bytearray, noise: np.random.Generator) -> None:
    del data[int(noise.integers(0, len(data))) :]


def _remove(data: bytearray, noise: np.random.Generator) -> None:
    first = int(noise.integers(0, len(data)))
    del data[first : first + int(noise.integers(1, 200))]


def _repeat(data: bytearray, noise: np.random.Generator) -> None:
    first = int(noise.integers(0, len(data)))
    part = data[first : first + int(noise.integers(1, 400))]
    data[first:first] = part * int(noise.integers(1, 20))


def _extreme(data: bytearray, noise: np.random.Generator) -> None:
    """A number of the header becomes one that programs trip over."""
    numbers = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0]
    width = int(noise.choice([1, 2, 4]))
    first = int(noise.integers(0, max(min(len(data), 400) - width, 1)))
    order = "big" if noise.integers(0, 2) else "little"
    value = int(noise.choice(numbers)) & ((1 << 8 * width) - 1)
    data[first : first + width] = value.to_bytes(width, order)  # type: ignore[arg-type]


def _splice(data: bytearray, noise: np.random.Generator) -> None:
    other = list(originals().values())[int(noise.integers(0, len(originals())))]
    middle = int(noise.integers(0, len(data)))
    data[middle:] = other[int(noise.integers(0, len(other))) :]


DAMAGE: list[Callable[[bytearray, np.random.Generator], None]] = [
    _flip, _overwrite, _cut, _remove, _repeat, _extreme, _extreme, _splice,
]  # fmt: skip


def mutant(seed: int) -> tuple[str, bytes]:
    """The format and bytes of one damaged file; the same for the same seed."""
    noise = np.random.default_rng(seed)
    names = list(originals())
    name = names[seed % len(names)]
    data = bytearray(originals()[name])
    for _ in range(int(noise.integers(1, 4))):
        DAMAGE[int(noise.integers(0, len(DAMAGE)))](data, noise)
        if not data:
            break
    return name, bytes(data)


def blank_image(mode: str, width: int, height: int, image_format: str, **options: object) -> bytes:
    """A picture of nothing, which packs well."""
    return encoded(Image.new(mode, (width, height)), image_format, **options)
