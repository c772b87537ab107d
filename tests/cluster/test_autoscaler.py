"""The files for `ray up`: valid by Ray's own schema, the worker shapes of the Kubernetes objects."""

import json
from importlib.resources import files
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.rendered import CHECKOUT, cluster_specs

CLOUDS = ("aws", "gcp")
RESERVED_CPUS = 1
"""What Kubernetes itself needs of a node: a pod asks for one CPU less than its machine has."""


def read(cloud: str) -> Any:
    return yaml.safe_load((CHECKOUT / "cluster" / "autoscaler" / f"{cloud}.yaml").read_text())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_it_holds_against_rays_schema_as_written_and_with_rays_defaults(cloud: str) -> None:
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text())
    jsonschema.validate(read(cloud), schema)
    prepared = prepare_config(read(cloud))
    validate_config(prepared)
    assert prepared["provider"]["type"] == cloud


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_mistake_fails_rays_schema(cloud: str) -> None:
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(read(cloud) | {"max_worker": 3}, schema)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_worker_shapes_are_those_of_kubernetes(cloud: str) -> None:
    types = read(cloud)["available_node_types"]
    for group in cluster_specs(cloud)["RayCluster"]["workerGroupSpecs"]:
        requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        machine = types[group["groupName"]]
        assert (machine["min_workers"], machine["max_workers"]) == (0, group["maxReplicas"])
        assert machine["resources"]["CPU"] - RESERVED_CPUS == int(requests["cpu"])
        assert machine["resources"].get("GPU", 0) == int(requests.get("nvidia.com/gpu", 0))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_jobs_are_told_how_far_the_cluster_can_grow(cloud: str) -> None:
    config = read(cloud)
    workers = [kind for name, kind in config["available_node_types"].items() if name != "head"]
    total = {
        name: sum(kind["max_workers"] * kind["resources"].get(name, 0) for kind in workers)
        for name in ("CPU", "GPU")
    }
    told = next(o for o in config["docker"]["run_options"] if "FEATUREX_MAX_RESOURCES" in o)
    assert told == f"--env FEATUREX_MAX_RESOURCES=CPU={total['CPU']},GPU={total['GPU']}"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_runs_no_work_workers_are_spot_and_a_token_is_needed(cloud: str) -> None:
    config = read(cloud)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert "MarketOptions" not in types["head"]["node_config"]
    for worker in ("decode", "extract"):
        settings = types[worker]["node_config"]
        spot = [{"preemptible": True}] if cloud == "gcp" else {"MarketType": "spot"}
        assert settings.get("scheduling", settings.get("InstanceMarketOptions")) == spot
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/featurex/.ray/auth_token": "~/.ray/auth_token"}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_gpu_workers_take_the_cuda_image(cloud: str) -> None:
    config = read(cloud)
    cpu, cuda = config["docker"]["image"], config["available_node_types"]["extract"]["docker"]["worker_image"]
    assert cuda == cpu.removesuffix("-cpu") + "-cuda"
    image = cluster_specs(cloud)["RayCluster"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert cpu == image
