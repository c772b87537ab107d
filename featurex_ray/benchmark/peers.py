"""The same work as it is usually written: a torch DataLoader loop, and Ray Data as its docs show.

Each is what the projects' own guides to batch inference describe, with the settings that those
recommend: a worker for each CPU, batches, inference mode, a model that is loaded once. The network is
the extractor's, so that only the plumbing differs; media are decoded with Pillow and decord. Neither
resumes, keeps failures, or checks a frame's number. Run as a module, in a process of its own:

    python -m featurex_ray.benchmark.peers dataloader MANIFEST OUTPUT torchvision/resnet18 none 2
"""

import io
import sys
from collections.abc import Callable
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from featurex_ray.media.sniff import sniff
from featurex_ray.models.build import build
from featurex_ray.models.registry import resolve
from featurex_ray.models.spec import ExtractorSpec

BATCH_PIXELS = 64 * 224 * 224
MOST_FRAMES = 512
FRAMES = 16


def transform_of(spec: ExtractorSpec) -> Callable[[Any], Tensor]:
    """The extractor's preprocessing by torchvision's transforms."""
    size = [spec.input.height, spec.input.width]
    fit = (
        [v2.Resize(size)]
        if spec.input.resize is None
        else [v2.Resize(spec.input.resize), v2.CenterCrop(size)]
    )
    scale = v2.ToDtype(torch.float32, scale=True)
    steps = v2.Compose([v2.ToImage(), *fit, scale, v2.Normalize(list(spec.mean), list(spec.std))])
    return lambda image: cast("Tensor", steps(image))


def read(row: dict[str, Any]) -> bytes:
    """The encoded media of a manifest row."""
    if row.get("data") is not None:
        return bytes(row["data"])
    with fsspec.open(row["uri"]) as file:
        return bytes(file.read())


def is_video(data: bytes) -> bool:
    """Whether encoded media are a video."""
    return sniff(data).media_type == "video"


def frames_of(row: dict[str, Any], transform: Callable[[Any], Tensor]) -> Tensor:
    """(T, 3, H, W) float32: one frame of an image, `FRAMES` of a video, evenly spread."""
    data = read(row)
    if not is_video(data):
        return transform(Image.open(io.BytesIO(data)).convert("RGB")).unsqueeze(0)
    import decord

    video = decord.VideoReader(io.BytesIO(data), num_threads=1)
    wanted = np.linspace(0, len(video) - 1, FRAMES).astype(int)
    return torch.stack([transform(Image.fromarray(frame)) for frame in video.get_batch(wanted).asnumpy()])


class Network:
    """The extractor on its device; a video's feature is the mean over its frames."""

    def __init__(self, extractor: str, weights: str) -> None:
        resolved = resolve(extractor, weights=weights)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = build(resolved.spec, resolved.weights)
        if isinstance(self._model, torch.nn.Module):
            self._model = self._model.to(self.device)
        self._whole_clips = resolved.spec.media == "video"

    def __call__(self, frames: Tensor) -> np.ndarray:
        """(B, T, 3, H, W) float32 -> (B, D) float32."""
        with torch.inference_mode():
            frames = frames.to(self.device)
            if self._whole_clips:
                return self._feature(frames)
            each = self._feature(frames.flatten(0, 1).unsqueeze(1))
            mean: np.ndarray = each.reshape(*frames.shape[:2], -1).mean(axis=1)
            return mean

    def _feature(self, clips: Tensor) -> np.ndarray:
        output = self._model(clips)
        feature: np.ndarray = (output[0] if isinstance(output, tuple) else output).cpu().numpy()
        return feature


class Rows(Dataset[tuple[str, Tensor]]):
    """A manifest's samples for a DataLoader's workers."""

    def __init__(self, rows: pa.Table, transform: Callable[[Any], Tensor]) -> None:
        self._rows = rows
        self._transform = transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        row = self._rows.slice(index, 1).to_pylist()[0]
        return row["sample_id"], frames_of(row, self._transform)


def batch_of(rows: pa.Table, spec: ExtractorSpec) -> int:
    """Samples of a batch: 64 pictures of 224x224, more where they are small, fewer where each is a video."""
    frames = min(BATCH_PIXELS // (spec.input.height * spec.input.width), MOST_FRAMES)
    return max(frames // FRAMES if is_video(read(rows.slice(0, 1).to_pylist()[0])) else frames, 1)


def dataloader(manifest: str, output: str, extractor: str, weights: str, num_cpus: int) -> None:
    """PyTorch's way: worker processes decode, the main process runs the model."""
    rows = pq.read_table(manifest)
    network = Network(extractor, weights)
    spec = resolve(extractor, weights=weights).spec
    loader = DataLoader(
        Rows(rows, transform_of(spec)),
        batch_size=batch_of(rows, spec),
        num_workers=num_cpus,
        pin_memory=network.device.type == "cuda",
    )
    ids: list[str] = []
    features: list[np.ndarray] = []
    for names, frames in loader:
        ids += names
        features.append(network(frames))
    pq.write_table(pa.table({"sample_id": ids, "feature": list(np.concatenate(features))}), output)


class RayNetwork:
    """The network as Ray Data's actors hold it."""

    def __init__(self, extractor: str, weights: str) -> None:
        self._network = Network(extractor, weights)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Frames in, features out."""
        frames = torch.from_numpy(np.stack(list(batch["frames"])))
        return {"sample_id": batch["sample_id"], "feature": self._network(frames)}


def ray_data(manifest: str, output: str, extractor: str, weights: str, num_cpus: int) -> None:
    """Ray Data's way: tasks read and preprocess, a pool of actors runs the model, `write_parquet`."""
    import ray.data

    gpus = torch.cuda.device_count()
    size = gpus or max(num_cpus // 2, 1)
    # One CPU beyond the actors', for the tasks that read.
    ray.init(address="local", num_cpus=max(num_cpus, size + 1), log_to_driver=False)
    spec = resolve(extractor, weights=weights).spec
    transform = transform_of(spec)
    first = pq.ParquetFile(manifest)

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        return {"sample_id": row["sample_id"], "frames": frames_of(row, transform).numpy()}

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "sample_id": row["path"],
            "frames": transform(Image.fromarray(row["image"])).unsqueeze(0).numpy(),
        }

    uris = [] if "data" in first.schema_arrow.names else first.read(["uri"])["uri"].to_pylist()
    if uris and not is_video(read({"uri": uris[0]})):
        decoded = ray.data.read_images(uris, mode="RGB", include_paths=True).map(preprocess)
    elif uris:
        decoded = ray.data.from_arrow(first.read()).repartition(4 * num_cpus).map(decode)
    else:
        decoded = ray.data.read_parquet(manifest).map(decode)
    features = decoded.map_batches(
        RayNetwork,
        fn_constructor_args=(extractor, weights),
        batch_size=batch_of(first.read_row_group(0), spec),
        compute=ray.data.ActorPoolStrategy(size=size),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
    )
    features.write_parquet(output)
    ray.shutdown()


PEERS = {"dataloader": dataloader, "ray-data": ray_data}


if __name__ == "__main__":
    name, manifest, output, extractor, weights, num_cpus = sys.argv[1:]
    PEERS[name](manifest, output, extractor, weights, int(num_cpus))
