"""M4 and M7: files that grow without bound, and memory that grows with every open."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from featurex_ray.contained import ProcessLimits
from featurex_ray.contained.limits import status_bytes
from featurex_ray.errors import SampleError
from featurex_ray.media.contained import ContainedDecoder
from featurex_ray.media.limits import MediaLimits
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import DecodeOptions, SampleRequest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest
from tests.hostile.campaign import FULL, count, report
from tests.hostile.mutants import blank_image, originals
from tests.media.barcode import encoded

REQUEST = SampleRequest(ClipRequest(Sampling("uniform", 2)))
MIB = 1 << 20


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, rows: int | None = None) -> bytes:
    """A PNG whose pixels are all zero, made without holding them."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    row = bytes(min(1 + (width * channels * bits + 7) // 8, 64 * MIB))
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(rows or height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def forged(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def film(codec: str, container: str, width: int, height: int, num_frames: int, **options: str) -> bytes:
    """A black film; its first packets are repeated, so that a million of them take seconds."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        frame = av.VideoFrame(width, height, stream.pix_fmt)
        for plane in frame.planes:  # else it shows what lay in memory before, and that packs badly
            plane.update(bytes(plane.buffer_size))
        packets = [*stream.encode(frame), *stream.encode(None)]
        body = bytes(packets[0])
        for number in range(num_frames):
            packet = av.Packet(body)
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = stream.codec_context.time_base, True
            output.mux(packet)
    return target.getvalue()


def many_frames() -> bytes:
    return film("mjpeg", "avi", 16, 16, count(20_001, 1_000_001))


SMALL_GIF, SMALL_TIFF, SMALL_BMP = (
    encoded(Image.new("RGB", (8, 8)), form) for form in ("GIF", "TIFF", "BMP")
)

VP9 = {"deadline": "realtime", "cpu-used": "8"}

BOMBS: dict[str, Callable[[], bytes]] = {
    "png of 30000x30000": lambda: png(30_000, 30_000, bits=1, colour=0),
    "png of 2000000x40": lambda: png(2_000_000, 40),
    "png that claims 2 billion squared": lambda: png(0x7FFFFFFF, 0x7FFFFFFF, rows=1, bits=1, colour=0),
    "png of 8001x8000, 16 bits and alpha": lambda: png(8_001, 8_000, bits=16, colour=6),
    "gif that claims 65535 squared": lambda: forged(SMALL_GIF, 6, b"\xff" * 4),
    "bmp that claims 2 billion squared": lambda: forged(SMALL_BMP, 18, struct.pack("<ii", 1 << 30, 1 << 30)),
    "webp of 16383x4000": lambda: blank_image("L", 16_383, 4_000, "WEBP", quality=1, method=0),
    "jpeg of 65500x1500": lambda: blank_image("L", 65_500, 1_500, "JPEG"),
    "jpeg that claims 65500 squared": lambda: _jpeg_claims(),
    "tiff of 10000x10000": lambda: blank_image("1", 10_000, 10_000, "TIFF", compression="group4"),
    "tiff that claims a billion columns": lambda: _tiff_claims(),
    "jpeg 2000 of 9000x9000": lambda: blank_image("L", 9_000, 9_000, "JPEG2000"),
    "ppm that claims a million squared": lambda: b"P6 1000000 1000000 255\n" + bytes(1000),
    "ico around a png of 10000x10000": lambda: _icon(png(10_000, 10_000, bits=1, colour=0)),
    "avif of 10000x6500": lambda: blank_image("L", 10_000, 6_500, "AVIF", speed=10),
    "h264 of 8192x8192": lambda: film("libx264", "mp4", 8192, 8192, 2, preset="ultrafast"),
    "mjpeg of 16384x8192": lambda: film("mjpeg", "avi", 16_384, 8_192, 2),
    "vp9 of 10000x6500": lambda: film("libvpx-vp9", "webm", 10_000, 6_500, 1, **VP9),
    "a great many tiny frames": many_frames,
    "a clip of too many frames": lambda: film("mjpeg", "avi", 16, 16, 15_000),
}


def _jpeg_claims() -> bytes:
    data = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return forged(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_500, 65_500))


def _tiff_claims() -> bytes:
    entry = struct.pack("<HHI", 256, 4, 1)
    data = SMALL_TIFF if entry in SMALL_TIFF else SMALL_TIFF.replace(struct.pack("<HHI", 256, 3, 1), entry)
    return forged(data, data.index(entry) + 8, struct.pack("<I", 1_000_000_000))


def _icon(inner: bytes) -> bytes:
    return bytes([0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 32, 0]) + struct.pack("<II", len(inner), 22) + inner


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {name: make() for name, make in BOMBS.items()}


def test_bombs(files: dict[str, bytes]) -> None:
    assert len(files) == 20
    limits = MediaLimits(max_frames=1_000_000 if FULL else 20_000)
    decoder = ContainedDecoder(DecodeOptions((InputSpec(64, 64),), "auto", limits))
    decoder.decode([(REQUEST, originals()["png"])])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here: making the files took some
    before = status_bytes("VmRSS")
    outcomes = {}
    for name, data in files.items():
        request = SampleRequest(ClipRequest(Sampling("every", 1))) if "clip" in name else REQUEST
        (done,) = decoder.decode([(request, data)])
        assert isinstance(done.outcome, SampleError), name
        outcomes[name] = done.outcome.code
    peak = status_bytes("VmHWM") - before
    report(
        "M4",
        bombs=len(outcomes),
        child_mib=decoder.peak_bytes() >> 20,
        parent_growth_mib=round(peak / MIB, 1),
    )
    assert set(outcomes.values()) == {"too_large"}
    assert decoder.peak_bytes() <= 1 << 30
    assert peak <= 100 * MIB
    decoder.process.close()


LARGEST: dict[str, Callable[[], bytes]] = {
    "gray png": lambda: png(8_000, 8_000, colour=0),
    "png of 16 bits and alpha": lambda: png(8_000, 8_000, bits=16, colour=6),
    "gray png of 16 bits": lambda: png(8_000, 8_000, bits=16, colour=0),
    "progressive jpeg": lambda: blank_image("RGB", 8_000, 8_000, "JPEG", progressive=True),
    "cmyk tiff": lambda: blank_image("CMYK", 8_000, 8_000, "TIFF", compression="tiff_lzw"),
    "h264 of 16 references": lambda: film("libx264", "mp4", 7_936, 7_936, 20, preset="ultrafast", refs="16"),
}
"""As large as the header may claim."""


@pytest.mark.parametrize("name", list(LARGEST) if FULL else ["gray png", "h264 of 16 references"])
def test_the_largest_allowed_stay_within_the_memory(name: str) -> None:
    decoder = ContainedDecoder(DecodeOptions((InputSpec(64, 64),), "pyav"))
    (done,) = decoder.decode([(REQUEST, LARGEST[name]())])
    outcome = done.outcome
    told = outcome.code if isinstance(outcome, SampleError) else "features"
    report("M4 largest", file=name, outcome=told, child_mib=decoder.peak_bytes() >> 20)
    assert told in ("features", "too_large")
    assert decoder.peak_bytes() <= 1 << 30
    decoder.process.close()


@pytest.mark.parametrize("memory_mib", [320, 440, 600, 800])
def test_wherever_memory_runs_out_it_is_said(memory_mib: int) -> None:
    """In decoding, in converting or in turning upright: not as a codec that isn't supported, or as damage."""
    limits = ProcessLimits(memory_bytes=memory_mib * MIB)
    decoder = ContainedDecoder(DecodeOptions((InputSpec(64, 64),), "pyav"), limits=limits)
    (done,) = decoder.decode([(REQUEST, film("mjpeg", "avi", 7_936, 7_936, 2))])
    assert isinstance(done.outcome, SampleError)
    assert done.outcome.code == "too_large"
    assert "out of memory" in done.outcome.message
    decoder.process.close()


def test_without_limits_a_bomb_takes_what_it_wants() -> None:
    """What the limits are for: with them off, one picture takes more than they allow."""
    code = (
        "import io, resource, sys; from PIL import Image; Image.MAX_IMAGE_PIXELS = None\n"
        "Image.open(io.BytesIO(sys.stdin.buffer.read())).convert('RGBA').load()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    bomb = png(20_000, 16_000, bits=1, colour=0)
    alone = subprocess.run([sys.executable, "-c", code], input=bomb, capture_output=True, check=True)
    assert int(alone.stdout) * 1024 > 1 << 30


def test_memory_does_not_grow_with_opens() -> None:
    """A leak grows in every window of opens; an allocator that still settles grows in its first ones only."""
    decoder = ContainedDecoder(
        DecodeOptions((InputSpec(32, 32),), "auto"), limits=ProcessLimits(items_per_child=1 << 40)
    )
    files = list(originals().values())
    window = count(1_000, 10_000)

    def growth() -> tuple[float, float]:
        """Bytes an open, of the child and of this process, over one window."""
        sizes = []
        for first in range(0, window, 100):
            decoder.decode([(REQUEST, files[n % len(files)]) for n in range(first, first + 100)])
            sizes.append((status_bytes("VmRSS", pid=decoder.process.child_pid), status_bytes("VmRSS")))
        child, parent = np.polyfit(100 * np.arange(len(sizes)), np.array(sizes, float), 1)[0]
        return float(child), float(parent)

    growth()  # the first opens load libraries and fill caches
    for windows in range(1, count(8, 1) + 1):
        child, parent = growth()
        report("M7", opens=window * (windows + 1), child_bytes_an_open=child, parent_bytes_an_open=parent)
        if max(child, parent) <= 1024:
            break
    assert max(child, parent) <= 1024
    decoder.process.close()
