import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from featurex_ray.errors import ExtractorError
from featurex_ray.models import registry, torchvision_zoo
from featurex_ray.models.registry import list_extractors, resolve

OWN = "tests.models.own"


def test_resolve_fills_in_the_defaults() -> None:
    spec = resolve("cnn_lstm, rnn=gru", weights="none").spec
    assert spec.name == "cnn_lstm"
    assert spec.options == (("backbone", "squeezenet1_0"), ("hidden", "256"), ("rnn", "gru"))
    assert (spec.media, spec.dimension, spec.attention_shape) == ("video", 256, ())
    assert spec.weights.seeded == ("all",)


def test_resolve_is_picklable() -> None:
    resolved = resolve("attention_cnn,backbone=mobilenet_v2", weights="none")
    assert pickle.loads(pickle.dumps(resolved)) == resolved
    assert resolved.spec.dimension == 1280
    assert resolved.spec.attention_shape == (7, 7)


def test_resolve_finds_ones_own() -> None:
    spec = resolve(f"{OWN}:MeanColour").spec
    assert (spec.name, spec.dimension, spec.architecture) == (f"{OWN}:MeanColour", 3, "mean colour 1")
    assert spec.to_json()["weights"] == "none"


def test_resolve_hashes_the_source_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revisions = set()
    for place, value in (("a", 1), ("b", 2)):
        folder = tmp_path / place
        folder.mkdir()
        (folder / f"mine_{place}.py").write_text(
            "from featurex_ray.media.preprocess import InputSpec\n"
            "from featurex_ray.models.spec import ExtractorSpec\n"
            "class E:\n"
            "    spec = ExtractorSpec(dimension=1, input=InputSpec(8, 8))\n"
            f"    def __call__(self, frames): return frames.mean((2, 3, 4)) * {value}\n"
        )
        monkeypatch.syspath_prepend(folder)
        spec = resolve(f"mine_{place}:E").spec
        assert spec.architecture.startswith("source ")
        revisions.add(spec.revision(sampling="keyframes", clip=None, precision="fp32", decoder="pyav"))
    assert len(revisions) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "did you mean torchvision/resnet18"),
        ("cnn_ltsm", "did you mean cnn_lstm"),
        ("zzzz", "featurex extractors"),
        ("", "no extractor ''"),
        ("torchvision/resnet19", "did you mean torchvision/resnet1"),
        ("torchvision/fasterrcnn_resnet50_fpn", "no model 'fasterrcnn_resnet50_fpn'"),
        ("torchvision/resnet18,rnn=gru", "takes no options"),
        ("attention_convnet,backbone=resnet18", "no option 'backbone': it takes attention"),
        ("attention_convnet,attention=maybe", "must be yes or no"),
        ("cnn_lstm,cell=gru", "no option 'cell': it takes backbone, rnn, hidden"),
        ("cnn_lstm,rnn", "an option is key=value"),
        ("cnn_lstm,rnn=rnn", "must be lstm or gru"),
        ("cnn_lstm,rnn=gru,rnn=lstm", "gives an option twice"),
        ("cnn_lstm,hidden=0", "a number from 1 to 8192"),
        ("cnn_lstm,hidden=many", "a number from 1 to 8192"),
        ("cnn_lstm,backbone=resnet81", "did you mean resnet"),
        ("cnn_lstm,backbone=r3d_18", "no image backbone 'r3d_18'"),
        ("no_such_package.here:It", "can't import 'no_such_package.here'"),
        (":It", "can't import ''"),
        (f"{OWN}:Nothing", "has no 'Nothing'"),
        (f"{OWN}:SMALL", "must be a class with a `spec`"),
        (f"{OWN}:WithoutSpec", "must be a class with a `spec`"),
        (f"{OWN}:WithoutCall", "must be a class with a `spec`"),
        (f"{OWN}:MeanColour,size=3", "takes no options"),
    ],
)
def test_resolve_fails(text: str, message: str) -> None:
    with pytest.raises(ExtractorError, match=message):
        resolve(text)


def test_resolve_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from featurex_ray.models.registry import BUILT_IN, list_extractors, resolve\n"
        "for row in list_extractors():\n"
        "    resolve(row.name, weights='none')\n"
        "resolve('attention_convnet'); resolve('cnn_lstm')\n"
        "loaded = {'torch', 'torchvision', 'ray'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_list_extractors_has_every_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / torchvision_zoo.IMAGE_MODELS["resnet18"].weights_file).touch()
    rows = {row.name: row for row in list_extractors()}
    zoo = len(torchvision_zoo.IMAGE_MODELS) + len(torchvision_zoo.VIDEO_MODELS)
    assert len(rows) == len(registry.BUILT_IN) + zoo
    assert rows["torchvision/resnet18"].on_disk
    assert not rows["torchvision/resnet34"].on_disk
    assert rows["torchvision/r3d_18"].media == "video"
    assert rows["cnn_lstm"].input == "3x224x224"
