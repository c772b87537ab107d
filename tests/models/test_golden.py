"""Golden features: every built-in extractor still gives what it gave, from bytes to numbers.

After a change on purpose (new weights, another architecture): `python -m tests.models.test_golden`
writes them anew; say why in the commit.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from featurex_ray.demo import MEDIA
from featurex_ray.media.image import decode_image
from featurex_ray.media.sampling import Sampling
from featurex_ray.media.video import ClipRequest, decode_video
from featurex_ray.models.embed import Embedder
from featurex_ray.models.registry import resolve

GOLDEN = Path(__file__).parent / "golden.json"
# Bundled weights where there are any, else seeded ones: both are the same everywhere.
EXTRACTORS = {
    "attention_convnet": None,
    "attention_convnet,attention=no": "none",
    "attention_cnn,backbone=squeezenet1_1": "none",
    "cnn_lstm": None,
    "cnn_lstm,backbone=squeezenet1_1,rnn=gru,hidden=32": "none",
    "torchvision/squeezenet1_1": "none",
    "torchvision/r3d_18": "none",
}
KEPT = 32


def features(text: str) -> np.ndarray:
    """(N, KEPT): the first values of three photographs' features, or of two clips'."""
    embedder = Embedder(resolve(text, weights=EXTRACTORS[text]), precision="fp32", device="cpu")
    spec = embedder.spec.input
    if embedder.spec.media == "any":
        names = ("chelsea.jpg", "coffee.webp", "camera.png")
        images = [(MEDIA / "images" / name).read_bytes() for name in names]
        frames = np.stack([decode_image(data, inputs=[spec]).frames[0] for data in images])
        return embedder.embed(frames, np.ones(3, int)).feature[:, :KEPT]
    request = ClipRequest(Sampling.parse("uniform:6"))
    videos = [(MEDIA / "videos" / name).read_bytes() for name in ("bikes.mp4", "nasa.mp4")]
    clips = [decode_video(data, request, inputs=[spec], policy="pyav").frames[0] for data in videos]
    return embedder.embed(np.concatenate(clips), np.array([len(clip) for clip in clips])).feature[:, :KEPT]


@pytest.mark.parametrize("text", EXTRACTORS)
def test_features_are_what_they_were(text: str) -> None:
    wanted = np.array(json.loads(GOLDEN.read_text())[text])
    found = features(text)
    # Other processors round otherwise; a changed pixel, weight or layer shows far above this.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


if __name__ == "__main__":
    rows = [f'"{text}": {json.dumps(np.round(features(text), 6).tolist())}' for text in EXTRACTORS]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
