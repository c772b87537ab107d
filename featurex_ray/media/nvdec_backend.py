"""NVDEC, the video decoder of NVIDIA GPUs, through torchcodec: an optional extra, `featurex-ray[nvdec]`.

It is only used where the header says that the card can do it and that the frames are those that PyAV lists,
and its frames are held against the timeline by their timestamps. CUDA needs more than a confined process may
do, so decoding in this way is `--isolation none`: for media that are trusted.
"""

import ctypes
import importlib
import importlib.util
from collections.abc import Iterator

import numpy as np
from PIL import Image

from featurex_ray.errors import RequestError
from featurex_ray.media.decoder import Shown, StreamHeader, Timeline, TimelineDisagreementError
from featurex_ray.media.sniff import Buffer

_CONTAINERS = frozenset({"mp4", "matroska"})
_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1"})
_FRAMES_AT_ONCE = 16
"""Full frames that are held on the device at a time."""


def is_installed() -> bool:
    """Whether torchcodec is here; it says only when it is imported whether it finds FFmpeg and CUDA."""
    return importlib.util.find_spec("torchcodec") is not None


def check() -> None:
    """Load all that decoding needs, in the process that will decode.

    Raises:
        RequestError: torchcodec, FFmpeg's libraries or the driver's NVDEC library are not here.
    """
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"decoder 'nvdec' needs torchcodec and FFmpeg's libraries: {first_line}"
        ) from error
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        raise RequestError(
            "decoder 'nvdec' needs libnvcuvid.so.1, which comes with NVIDIA's driver; containers see it "
            "where NVIDIA_DRIVER_CAPABILITIES has `video`"
        ) from error


def reads_exactly(header: StreamHeader) -> bool:
    """Whether a container's header promises that the card decodes it, to the frames that PyAV lists."""
    return header.container in _CONTAINERS and header.codec in _CODECS and header.is_plain


class NvdecDecoder:
    """torchcodec on one video whose timeline PyAV has read. See `FrameDecoder`.

    Args:
        data: The whole encoded object.
        timeline: What torchcodec must list too.
        device: Where to decode; `cpu` is the same code without the card, for tests.

    Raises:
        TimelineDisagreementError: It can't be opened, lists other frames, or the card can't do it.
    """

    name = "nvdec"

    def __init__(self, data: Buffer, timeline: Timeline, *, device: str = "cuda") -> None:
        from torchcodec.decoders import VideoDecoder

        self._pts_seconds = timeline.pts_seconds
        self._half_tick = float(timeline.time_base) / 2
        try:
            self._reader = VideoDecoder(bytes(data), dimension_order="NHWC", device=device)
        except (RuntimeError, ValueError) as error:
            raise TimelineDisagreementError(f"torchcodec: {error}") from error
        if len(self._reader) != len(timeline):
            raise TimelineDisagreementError(f"torchcodec lists {len(self._reader)} frames")
        if device != "cpu" and self._reader.cpu_fallback:
            raise TimelineDisagreementError(f"torchcodec: {self._reader.cpu_fallback}")

    def frames(self, indices: np.ndarray) -> Iterator[Shown]:
        """Decode frames of the timeline; see `FrameDecoder`."""
        for start in range(0, len(indices), _FRAMES_AT_ONCE):
            some = indices[start : start + _FRAMES_AT_ONCE]
            try:
                batch = self._reader.get_frames_at([int(index) for index in some])
            except (RuntimeError, IndexError) as error:
                raise TimelineDisagreementError(f"torchcodec: {error}") from error
            late = np.abs(batch.pts_seconds.numpy() - self._pts_seconds[some])
            if late.max() > self._half_tick:
                raise TimelineDisagreementError("torchcodec gave frames of other times")
            for index, pixels in zip(some, batch.data.cpu().numpy(), strict=True):
                yield Shown(int(index), Image.fromarray(pixels), intact=True)
