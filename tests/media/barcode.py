"""Test films whose every frame carries its own number in its pixels, as in the shared frame-id videos."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
WIDTH, HEIGHT = 320, 240
_BITS = 10


def draw(number: int) -> np.ndarray:
    """(240, 320, 3) uint8: ten blocks, most significant bit left, and their complement below."""
    rng = np.random.default_rng(number)
    frame = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    frame += np.kron(rng.integers(0, 60, (15, 20, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    for bit in range(_BITS):
        white = 255 if number >> (_BITS - 1 - bit) & 1 else 0
        columns = slice(10 + 30 * bit, 36 + 30 * bit)
        frame[16:64, columns], frame[176:224, columns] = white, 255 - white
    return frame


def read(frame: np.ndarray) -> int:
    """The number in a frame; -1 where the two rows contradict each other."""
    gray = frame.astype(float).mean(2)
    columns = [slice(16 + 30 * bit, 30 + 30 * bit) for bit in range(_BITS)]
    top = [gray[30:50, block].mean() > 128 for block in columns]
    bottom = [gray[190:210, block].mean() > 128 for block in columns]
    if any(a == b for a, b in zip(top, bottom, strict=True)):
        return -1
    return int("".join("1" if bit else "0" for bit in top), 2)


def film(
    container: str,
    codec: str,
    *,
    num_frames: int = 60,
    pixel_format: str = "yuv420p",
    fps: int = 25,
    gop: int = 12,
    options: dict[str, str] | None = None,
    pts: list[int] | None = None,
) -> bytes:
    """Encode a film; `pts` (in ticks of 1/fps) makes it one of variable rate."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        stream.gop_size = gop
        stream.bit_rate = 1_500_000
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return target.getvalue()


def photograph(width: int, height: int) -> Image.Image:
    """A picture with broad and fine structure, from a formula."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / 37 + y / 91), np.cos(x / 11 - y / 23), np.sin((x * y) / (width * 29))]
    pixels = np.stack([127 + 100 * wave for wave in waves], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    """The bytes of a picture in some format."""
    target = io.BytesIO()
    image.save(target, image_format, **options)
    return target.getvalue()
