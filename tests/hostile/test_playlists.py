"""M5: files that ask for other files or for the network. Nobody is asked, nothing is opened."""

import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from featurex_ray.errors import SampleError
from featurex_ray.media.contained import ContainedDecoder
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import DecodeOptions, InProcessDecoder, SampleDecoder, SampleRequest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest
from featurex_ray.storage import Fetcher, ReadPolicy
from tests.hostile.campaign import report
from tests.hostile.mutants import originals
from tests.hostile.playlists import HLS, TEXTS, hostile_files

OPTIONS = DecodeOptions((InputSpec(32, 32),))
REQUEST = SampleRequest(ClipRequest(Sampling("uniform", 2)))


class Listener:
    """Counts connections to a port on loopback."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}/evil.ts"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._server.close()


class Canary:
    """A real film that nobody may open; the kernel counts who does."""

    _OPENED, _NONBLOCKING = 0x20, os.O_NONBLOCK

    def __init__(self, folder: Path) -> None:
        self.path = folder / "canary.ts"
        self.path.write_bytes(originals()["ts"])
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(self._NONBLOCKING)
        assert libc.inotify_add_watch(self._watch, os.fsencode(self.path), self._OPENED) >= 0

    def opened(self) -> int:
        try:
            return len(os.read(self._watch, 1 << 16)) // 16
        except BlockingIOError:
            return 0


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path)


@pytest.fixture(params=["process", "none"])
def decoder(request: pytest.FixtureRequest) -> Iterator[SampleDecoder]:
    if request.param == "none":
        yield InProcessDecoder(OPTIONS)
        return
    made = ContainedDecoder(OPTIONS)
    yield made
    made.process.close()


def test_nothing_else_is_opened(
    decoder: SampleDecoder, listener: Listener, canary: Canary, tmp_path: Path
) -> None:
    """Under the names of media, through the fetcher, as a run does it."""
    files = dict(hostile_files(listener.url, str(canary.path)))
    names = ["evil.mp4", "evil.m3u8", "evil.png", "evil.mkv", "evil.svg"]
    paths = []
    for number, data in enumerate(files.values()):
        paths.append(tmp_path / f"{number:02d}-{names[number % len(names)]}")
        paths[-1].write_bytes(data)
    with Fetcher(ReadPolicy(str(tmp_path / "m.csv"))) as fetcher:
        media = [fetcher.fetch(str(path)).data for path in paths]
    outcomes = [done.outcome for done in decoder.decode([(REQUEST, data) for data in media])]
    codes = dict(zip(files, outcomes, strict=True))
    for name in files:
        if name.partition(",")[0] in TEXTS:
            outcome = codes[name]
            assert isinstance(outcome, SampleError), name
            assert outcome.code == "unsupported_container", name
    assert (listener.connections, canary.opened()) == (0, 0)
    report(f"M5 {type(decoder).__name__}", files=len(files), connections=0, opened=0)
    assert len(files) >= 60


def test_symlinks_are_judged_by_where_they_lead(canary: Canary, tmp_path: Path) -> None:
    inside = tmp_path / "media"
    inside.mkdir()
    (inside / "evil.mp4").symlink_to(canary.path)
    (inside / "folder").symlink_to(tmp_path)
    policy = ReadPolicy(str(inside / "m.csv"), only_prefixes=(str(inside),))
    with Fetcher(policy) as fetcher:
        for name in ("evil.mp4", "folder/canary.ts"):
            with pytest.raises(SampleError, match=r"refused_uri: .*its symlinks lead out"):
                fetcher.fetch(str(inside / name))
    assert canary.opened() == 0


UNGUARDED = """
import sys, av
try:
    with av.open(sys.argv[1], options={"protocol_whitelist": "file,http,tcp,crypto,data"}) as container:
        next(container.decode(video=0))
except Exception as error:
    print(error)
"""


def unguarded(path: Path) -> None:
    """FFmpeg as most programs call it: by path, all demuxers."""
    subprocess.run([sys.executable, "-c", UNGUARDED, str(path)], capture_output=True, check=False, timeout=60)


def test_without_the_lists_they_are_opened(listener: Listener, canary: Canary, tmp_path: Path) -> None:
    """Else the campaign would prove nothing."""
    (tmp_path / "evil.m3u8").write_text(HLS.format(target=listener.url))
    unguarded(tmp_path / "evil.m3u8")
    assert listener.connections > 0
    (tmp_path / "list.ffconcat").write_text(TEXTS["concat"].format(target=canary.path.name))
    unguarded(tmp_path / "list.ffconcat")
    assert canary.opened() > 0
