"""decord: H.264, VP8 and VP9 in mp4, webm and mkv, read from the front to the back.

decord 0.6 numbers frames by the packets that its own FFmpeg lists. So it is only used on the
codec and container pairs where these are the frames that come out, and where it lists the very
timestamps of our own timeline. It never seeks here, nor skips, which may seek: it was seen to
land on wrong frames behind edit lists (86 of 120), with open GOPs (a few) and with intra refresh
(72 of 120), which the container's header does not tell.
"""

import importlib.util
from collections.abc import Iterator

import numpy as np
from PIL import Image

from featurex_ray.media.decoder import Shown, StreamHeader, Timeline, TimelineDisagreementError
from featurex_ray.media.sniff import Buffer, BufferReader

_EXACT_PAIRS = {
    ("mp4", "h264"),
    ("matroska", "h264"),
    ("matroska", "vp8"),
    ("matroska", "vp9"),
}


def is_installed() -> bool:
    """Whether decord can be imported here (it has no wheels for some machines)."""
    return importlib.util.find_spec("decord") is not None


def preload() -> None:
    """Import decord now, so that nothing has to be opened later."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)


def reads_exactly(header: StreamHeader) -> bool:
    """Whether a container's header promises that decord gives the right frames."""
    return (header.container, header.codec) in _EXACT_PAIRS and header.is_plain


class DecordDecoder:
    """decord on one video whose timeline PyAV has read. See `FrameDecoder`.

    Args:
        data: The whole encoded object.
        timeline: What decord must list too.
        num_threads: Decoder threads.

    Raises:
        TimelineDisagreementError: decord can't open the video, or lists other frames.
    """

    name = "decord"

    def __init__(self, data: Buffer, timeline: Timeline, *, num_threads: int = 1) -> None:
        import decord

        self._error: type[Exception] = decord.DECORDError
        decord.logging.set_level(decord.logging.QUIET)
        try:
            self._reader = decord.VideoReader(BufferReader(data), num_threads=num_threads)
            listed = self._reader.get_frame_timestamp(np.arange(len(self._reader)))[:, 0]
        except self._error as error:
            raise TimelineDisagreementError(f"decord: {error}") from error
        self._position = 0
        half_tick = float(timeline.time_base) / 2
        if len(listed) != len(timeline) or np.abs(listed - timeline.pts_seconds).max() > half_tick:
            raise TimelineDisagreementError(f"decord lists {len(listed)} frames at other times")

    def frames(self, indices: np.ndarray) -> Iterator[Shown]:
        """Decode frames of the timeline; see `FrameDecoder`."""
        for index in indices:
            try:
                pixels = self._read_up_to(int(index))
            except (self._error, StopIteration) as error:
                raise TimelineDisagreementError(f"decord: {error}") from error
            if pixels.shape[2] != 3:  # seen on pictures of a few pixels
                raise TimelineDisagreementError(f"decord made an array of {pixels.shape}")
            yield Shown(int(index), Image.fromarray(pixels), intact=True)

    def _read_up_to(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8: the frame at `index`, all those before it read too."""
        while True:
            frame = self._reader.next()
            self._position += 1
            if self._position > index:
                return np.asarray(frame.asnumpy())
