"""What the overlays render to: kustomize itself (inside kubectl) builds them, once a session."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
KUBERNETES = CHECKOUT / "cluster" / "kubernetes"
OVERLAYS = ("aws", "gcp", "local")

Manifest = dict[str, Any]


class Pod(NamedTuple):
    """A pod as a controller will make it: who makes it, its labels and its spec."""

    origin: str
    labels: dict[str, str]
    spec: Manifest


@lru_cache
def render(overlay: str) -> list[Manifest]:
    """The objects of an overlay."""
    kubectl = shutil.which("kubectl", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if kubectl is None and sys.platform != "linux":
        pytest.skip("kubectl is not installed, and its package has wheels for Linux only")
    assert kubectl, "the dev dependencies bring kubectl"
    built = subprocess.run(
        [kubectl, "kustomize", KUBERNETES / "overlays" / overlay], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return list(yaml.load_all(built.stdout, yaml.CSafeLoader))


def find(overlay: str, kind: str, name: str | None = None) -> Manifest:
    """The object of that kind (and name)."""
    (found,) = [o for o in render(overlay) if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return found


def cluster_specs(overlay: str) -> dict[str, Manifest]:
    """Every Ray cluster spec of an overlay, by the object that holds it."""
    return {
        "RayCluster": find(overlay, "RayCluster")["spec"],
        "RayJob": find(overlay, "RayJob")["spec"]["rayClusterSpec"],
        "RayCronJob": find(overlay, "RayCronJob")["spec"]["jobTemplate"]["rayClusterSpec"],
    }


def pods(overlay: str) -> Iterator[Pod]:
    """Every pod that the overlay's objects lead to, with what KubeRay adds to Ray's."""
    for holder, spec in cluster_specs(overlay).items():
        yield _head(holder, spec)
        for group in spec["workerGroupSpecs"]:
            yield _pod(f"{holder}/{group['groupName']}", group["template"], {"ray.io/node-type": "worker"})
    for holder in ("RayJob", "RayCronJob"):
        spec = find(overlay, holder)["spec"]
        yield _pod(f"{holder}/submitter", spec.get("jobTemplate", spec)["submitterPodTemplate"])
    cron = find(overlay, "CronJob")["spec"]["jobTemplate"]["spec"]
    yield _pod("CronJob", cron["template"])


def _pod(origin: str, template: Manifest, ray: dict[str, str] | None = None) -> Pod:
    labels = {"ray.io/is-ray-node": "yes", **ray} if ray else {}
    return Pod(origin, template["metadata"]["labels"] | labels, copy.deepcopy(template["spec"]))


def _head(holder: str, spec: Manifest) -> Pod:
    """KubeRay's autoscaler runs beside the head, made from `autoscalerOptions`."""
    head = _pod(f"{holder}/head", spec["headGroupSpec"]["template"], {"ray.io/node-type": "head"})
    options = {
        key: value
        for key, value in spec["autoscalerOptions"].items()
        if key not in ("version", "idleTimeoutSeconds")
    }
    image = head.spec["containers"][0]["image"]
    head.spec["containers"].append({"name": "autoscaler", "image": image, **options})
    return head
