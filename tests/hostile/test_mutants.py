"""M1: damaged files of ten formats. Each gives features or exactly one failure."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from featurex_ray.contained import ProcessLimits
from featurex_ray.errors import SampleError
from featurex_ray.media.contained import ContainedDecoder
from featurex_ray.media.image import DecodedImage
from featurex_ray.media.preprocess import InputSpec
from featurex_ray.media.request import DecodeOptions, SampleRequest
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, DecodedVideo
from tests.hostile.campaign import count, report
from tests.hostile.mutants import mutant, originals

REQUEST = SampleRequest(ClipRequest(Sampling("uniform", 4)))
KNOWN = {
    *("empty", "unsupported_container", "truncated", "undecodable", "no_video", "no_frames", "too_large"),
    *("unsupported_codec", "timeout", "decoder_crashed"),
}
BATCH = 100


@pytest.mark.parametrize("policy", ["decord+pyav", "pyav"])
def test_mutants(policy: str) -> None:
    options = DecodeOptions((InputSpec(32, 32),), policy)  # type: ignore[arg-type]
    decoder = ContainedDecoder(options, limits=ProcessLimits(item_seconds=20))
    intact = decoder.decode([(REQUEST, data) for data in originals().values()])
    assert not any(isinstance(done.outcome, SampleError) for done in intact)
    codes: Counter[str] = Counter()
    total = count(300, 20_000) if policy == "decord+pyav" else count(100, 5_000)
    for first in range(0, total, BATCH):
        files = [mutant(seed)[1] for seed in range(first, first + BATCH)]
        done = decoder.decode([(REQUEST, data) for data in files])
        assert len(done) == len(files)
        for place, each in enumerate(done):
            if isinstance(each.outcome, SampleError):
                assert each.outcome.code in KNOWN, (first + place, each.outcome)
                codes[each.outcome.code] += 1
                continue
            assert isinstance(each.outcome, DecodedImage | DecodedVideo)
            codes["features"] += 1
            assert np.concatenate([array.ravel() for array in each.outcome.frames]).dtype == np.uint8
    assert sum(codes.values()) == total
    # Among the damaged files stand intact ones, decoded by children that saw the others.
    after = decoder.decode([(REQUEST, data) for data in originals().values()])
    for one, other in zip(intact, after, strict=True):
        assert isinstance(one.outcome, DecodedImage | DecodedVideo)
        assert isinstance(other.outcome, DecodedImage | DecodedVideo)
        assert np.array_equal(one.outcome.frames[0], other.outcome.frames[0])
    report(f"M1 {policy}", mutants=total, outcomes=dict(codes), peak_mib=decoder.peak_bytes() >> 20)
    decoder.process.close()


ALONE = """
from tests.hostile.mutants import mutant
from tests.hostile.test_mutants import REQUEST, DecodeOptions, InputSpec
from featurex_ray.media.request import decode_sample
decode_sample(REQUEST, mutant(16006)[1], DecodeOptions((InputSpec(32, 32),), "decord+pyav"))
"""


def test_a_mutant_that_ends_its_decoder() -> None:
    """Found by the campaign: decord 0.6 crashes on it, and takes along a process that isn't contained."""
    alone = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    if alone.returncode == 0:
        pytest.skip("these builds of the encoder and the decoder don't make it crash")
    assert alone.returncode < 0
    files = [originals()["png"], mutant(16006)[1], originals()["mp4"]]
    for policy in ("decord+pyav", "decord"):
        decoder = ContainedDecoder(DecodeOptions((InputSpec(32, 32),), policy))
        first, damaged, last = (one.outcome for one in decoder.decode([(REQUEST, d) for d in files]))
        assert isinstance(first, DecodedImage)
        assert isinstance(last, DecodedVideo)
        decoder.process.close()
        if policy == "decord":
            assert isinstance(damaged, SampleError)
            assert (damaged.code, damaged.attempts) == ("decoder_crashed", 2)
        else:  # the second try is PyAV's
            assert isinstance(damaged, DecodedVideo)
            assert (damaged.decoder, damaged.complete) == ("pyav", False)
