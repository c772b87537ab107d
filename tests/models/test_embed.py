"""One contract for every extractor, and what the embedder does when something goes wrong."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from featurex_ray.models import embed
from featurex_ray.models.embed import Embedder, Normalise
from featurex_ray.models.registry import resolve

KINDS = [
    "attention_convnet",
    "attention_cnn,backbone=squeezenet1_1",
    "cnn_lstm,backbone=squeezenet1_1,hidden=16",
    "cnn_lstm,backbone=squeezenet1_1,hidden=16,rnn=gru",
    "torchvision/squeezenet1_1",
    "torchvision/mobilenet_v3_small",
    "torchvision/r3d_18",
    "tests.models.own:MeanColour",
    "tests.models.own:LastFrame",
]
LENGTHS = np.array([2, 3, 2])


def embedder(text: str, *, precision: str = "fp32", batch_frames: int | None = 4) -> Embedder:
    weights = None if ":" in text else "none"
    return Embedder(
        resolve(text, weights=weights), precision=precision, device="cpu", batch_frames=batch_frames
    )


def random_frames(made: Embedder, count: int) -> np.ndarray:
    size = made.spec.input
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, size.height, size.width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(5, 224, 224, 3), (2, 3, 224, 224, 3)])
def test_frames_are_normalised_as_torchvision_does_and_stay_as_they_lie(shape: tuple[int, ...]) -> None:
    spec = resolve("torchvision/squeezenet1_1", weights="none").spec
    frames = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = Normalise(spec, torch.device("cpu"))(frames)
    wanted = normalize(frames.movedim(-1, -3) / 255, list(spec.mean), list(spec.std))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32
    assert found.movedim(-3, -1).is_contiguous()


@pytest.mark.parametrize("text", KINDS)
def test_contract(text: str) -> None:
    made = embedder(text)
    spec = made.spec
    frames = random_frames(made, int(LENGTHS.sum()))
    whole = made.embed(frames, LENGTHS)

    assert whole.feature.shape == (3, spec.dimension)
    assert whole.feature.dtype == np.float32
    assert np.isfinite(whole.feature).all()
    assert whole.errors == {}
    assert whole.finite.all()
    assert np.ptp(whole.feature, axis=0).max() > 0

    if spec.attention_shape is None:
        assert whole.attention is None
        assert whole.attention_shape is None
    else:
        wanted = [spec.attention_shape or (int(n),) for n in LENGTHS]
        assert whole.attention_shape == wanted
        for weights, shape in zip(whole.attention, wanted, strict=True):
            assert weights.shape == (np.prod(shape),)
            assert weights.sum() == pytest.approx(1, abs=1e-5)

    # Alone, in another order, in batches of another size: the same feature.
    starts = np.cumsum(LENGTHS) - LENGTHS
    clips = [frames[s : s + n] for s, n in zip(starts, LENGTHS, strict=True)]
    for clip, feature in zip(clips, whole.feature, strict=True):
        alone = made.embed(clip, np.array([len(clip)]))
        np.testing.assert_allclose(alone.feature[0], feature, rtol=0, atol=1e-5)
    reverse = made.embed(np.concatenate(clips[::-1]), LENGTHS[::-1])
    np.testing.assert_allclose(reverse.feature[::-1], whole.feature, rtol=0, atol=1e-5)
    made.batch_frames = 16
    wide = made.embed(frames, LENGTHS)
    np.testing.assert_allclose(wide.feature, whole.feature, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["attention_convnet", "torchvision/squeezenet1_1"])
def test_feature_of_a_video_is_the_mean_of_its_frames(text: str) -> None:
    made = embedder(text)
    frames = random_frames(made, 5)
    each = made.embed(frames, np.ones(5, int))
    video = made.embed(frames, np.array([5]))
    np.testing.assert_allclose(video.feature[0], each.feature.mean(axis=0), rtol=0, atol=1e-5)
    if each.attention is not None:
        np.testing.assert_allclose(video.attention[0], np.mean(each.attention, axis=0), atol=1e-6)


def test_normalisation_is_that_of_the_spec() -> None:
    made = embedder("tests.models.own:MeanColour")
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    frames[..., 0] = 255
    wanted = (np.array([1, 0, 0]) - made.spec.mean) / made.spec.std
    np.testing.assert_allclose(made.embed(frames, np.array([1])).feature[0], wanted, rtol=1e-5)


def test_order_of_frames_matters_to_cnn_lstm() -> None:
    made = embedder("cnn_lstm,backbone=squeezenet1_1,hidden=16")
    frames = random_frames(made, 4)
    forth, back = (made.embed(f, np.array([4])).feature for f in (frames, frames[::-1]))
    assert np.abs(forth - back).max() > 1e-4


@pytest.mark.parametrize(
    "text", ["attention_convnet", "attention_cnn,backbone=squeezenet1_1", "cnn_lstm,backbone=squeezenet1_1"]
)
def test_bf16_is_close_to_fp32(text: str) -> None:
    exact = embedder(text)
    frames = random_frames(exact, 4)
    a = exact.embed(frames, np.array([2, 2]))
    b = embedder(text, precision="bf16").embed(frames, np.array([2, 2]))
    cosine = (
        (a.feature * b.feature).sum(1) / np.linalg.norm(a.feature, axis=1) / np.linalg.norm(b.feature, axis=1)
    )
    assert cosine.min() > 0.999
    assert not np.array_equal(a.feature, b.feature)
    for weights in b.attention:
        assert weights.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_float32_is_all_of_float32_in_any_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    embedder("cnn_lstm,backbone=squeezenet1_1,hidden=16", precision=precision)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_read_only_frames_serve() -> None:
    made = embedder("attention_convnet")
    frames = np.frombuffer(random_frames(made, 3).tobytes(), np.uint8).reshape(3, 32, 32, 3)
    assert made.embed(frames, np.ones(3, int)).finite.all()


def test_no_clips_give_no_features() -> None:
    features = embedder("attention_convnet").embed(np.empty((0, 32, 32, 3), np.uint8), np.empty(0, int))
    assert features.feature.shape == (0, 84)


def test_batches_have_few_shapes() -> None:
    sizes = [len(padded) for n in range(1, 100) for _, padded in embed._batches(np.arange(n), 32)]
    assert set(sizes) <= {1, 2, 4, 8, 12, 16, 20, 24, 28, 32}
    sizes = [len(padded) for n in range(1, 100) for _, padded in embed._batches(np.arange(n), 39)]
    assert set(sizes) <= {1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 39}
    for n in (1, 31, 32, 33, 77):
        cut = list(embed._batches(np.arange(n), 32))
        assert sum(real for real, _ in cut) == n
        assert np.concatenate([padded[:real] for real, padded in cut]).tolist() == list(range(n))


def test_batch_is_halved_until_memory_suffices() -> None:
    made = embedder("tests.models.own:Hungry", batch_frames=16)
    frames = random_frames(made, 11)
    features = made.embed(frames, np.array([5, 6]))
    assert made.batch_frames == 2
    wanted = embedder("tests.models.own:MeanColour").embed(frames, np.array([5, 6]))
    np.testing.assert_allclose(features.feature, wanted.feature, atol=1e-6)


def test_clips_that_never_fit_fail() -> None:
    made = embedder("tests.models.own:Insatiable", batch_frames=4)
    features = made.embed(random_frames(made, 5), np.array([2, 3]))
    assert {clip: error.code for clip, error in features.errors.items()} == {0: "too_large", 1: "too_large"}
    assert not features.finite.any()


def test_only_the_clip_with_nan_fails() -> None:
    made = embedder("tests.models.own:NotANumber")
    frames = np.full((6, 8, 8, 3), 9, np.uint8)
    frames[3] = 0
    features = made.embed(frames, np.array([2, 2, 2]))
    assert features.errors[1].code == "non_finite"
    assert features.finite.tolist() == [True, False, True]
    np.testing.assert_array_equal(features.feature[[0, 2]], 1)


def test_only_the_clip_of_wrong_length_fails() -> None:
    made = embedder("tests.models.own:LastFrame")
    features = made.embed(random_frames(made, 6), np.array([3, 1, 2]))
    assert features.errors[1].code == "wrong_clip_length"
    assert "at least 2 frames and this one has 1; --sampling uniform:16" in features.errors[1].message
    assert features.finite.tolist() == [True, False, True]
    assert features.attention[2].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("frames", "lengths", "message"),
    [
        (np.zeros((2, 8, 9, 3), np.uint8), [2], r"frames must be \(F, 8, 8, 3\) uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), [2], "not .* float32"),
        (np.zeros((2, 8, 8, 3), np.uint8), [3], "sum to 2 frames"),
        (np.zeros((2, 8, 8, 3), np.uint8), [2, 0], "must be positive"),
    ],
)
def test_embed_fails(frames: np.ndarray, lengths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder("tests.models.own:MeanColour").embed(frames, np.array(lengths))


@pytest.mark.parametrize(
    ("name", "message"),
    [("WrongDimension", r"gave \(1, 3\), not \(1, 4\)"), ("Unannounced", "gives attention and its spec")],
)
def test_an_extractor_that_is_not_its_spec_fails(name: str, message: str) -> None:
    made = embedder(f"tests.models.own:{name}")
    with pytest.raises(ValueError, match=message):
        made.embed(random_frames(made, 2)[:1], np.array([1]))


def test_threads_are_those_that_were_given() -> None:
    Embedder(resolve("attention_convnet", weights="none"), precision="fp32", num_threads=2)
    assert torch.get_num_threads() == 2
