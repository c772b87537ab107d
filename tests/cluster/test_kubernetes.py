"""The Kubernetes objects: valid by the real schemas, one cluster spec, closed network, nightly job.

The schemas' CEL rules (`x-kubernetes-validations`) need an API server and are not evaluated here.
"""

import gzip
import re
import tomllib
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.cluster.rendered import CHECKOUT, OVERLAYS, Manifest, Pod, cluster_specs, find, pods, render

CRDS = CHECKOUT.parent / "shared" / "kuberay-crds"
KUBERNETES_VERSIONS = ("1.33", "1.37")
METADATA_SERVICE = "169.254.169.254"

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def strict(schema: Any) -> Any:
    """An OpenAPI v3 schema of a CRD as JSON schema, in which unknown fields are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items() if key not in ("nullable", "format")}
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not open_ended:
        out["additionalProperties"] = False
    return out


@lru_cache
def crd_schema(kind: str) -> Any:
    path = CRDS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not path.is_file():
        pytest.skip("../shared/kuberay-crds is not there")
    crd = yaml.load(gzip.decompress(path.read_bytes()), yaml.CSafeLoader)
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, checked below
    return schema


@every_overlay
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayCronJob"])
def test_ray_objects_hold_against_kuberays_schemas(overlay: str, kind: str) -> None:
    jsonschema.Draft202012Validator(crd_schema(kind)).validate(find(overlay, kind))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "headGroupSpecs"], {}),
        (["spec", "authOptions", "mode"], "none"),
        (["spec", "workerGroupSpecs", 0, "maxReplicas"], "many"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "hostsNetwork"], True),
    ],
)
def test_ray_objects_with_a_mistake_fail_the_schema(path: list[str | int], value: Any) -> None:
    schema = crd_schema("RayCluster")
    wrong = yaml.safe_load(yaml.safe_dump(find("aws", "RayCluster")))
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=r"headGroupSpecs|none|many|hostsNetwork"):
        jsonschema.Draft202012Validator(schema).validate(wrong)


@every_overlay
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_other_objects_hold_against_kubernetes_schemas(overlay: str, version: str) -> None:
    plain = [o for o in render(overlay) if not o["apiVersion"].startswith("ray.io/")]
    assert {o["kind"] for o in plain} == {
        "Namespace",
        "ConfigMap",
        "ServiceAccount",
        "NetworkPolicy",
        "CronJob",
    }
    for manifest in plain:
        kubernetes_validate.validate(manifest, version, strict=True)


@every_overlay
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_pods_of_ray_objects_hold_against_kubernetes_schemas(overlay: str, version: str) -> None:
    """KubeRay's schemas carry a copy of the pod's; the real one is stricter about required fields."""
    for pod in pods(overlay):
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod.spec}
        kubernetes_validate.validate(manifest, version, strict=True)


@every_overlay
def test_everything_lies_in_the_namespace_and_names_are_short_enough_for_kuberay(overlay: str) -> None:
    longest = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
    for manifest in render(overlay):
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "featurex"
        assert len(manifest["metadata"]["name"]) <= longest.get(manifest["kind"], 63)


@every_overlay
def test_all_runs_use_one_cluster_spec_after_all_patches(overlay: str) -> None:
    specs = cluster_specs(overlay)
    assert specs["RayJob"] == specs["RayCluster"] == specs["RayCronJob"]
    job, nightly = find(overlay, "RayJob")["spec"], find(overlay, "RayCronJob")["spec"]["jobTemplate"]
    assert job["submitterPodTemplate"] == nightly["submitterPodTemplate"]


@every_overlay
def test_clusters_start_from_zero_with_an_idle_head_and_a_token(overlay: str) -> None:
    spec = cluster_specs(overlay)["RayCluster"]
    assert spec["rayVersion"] == pinned("ray")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token", "secretName": "featurex-token"}
    assert spec["enableInTreeAutoscaling"]
    for group in spec["workerGroupSpecs"]:
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
        assert group["maxReplicas"] > 0
    groups = {group["groupName"] for group in spec["workerGroupSpecs"]}
    assert groups == ({"decode"} if overlay == "local" else {"decode", "extract"})


@pytest.mark.parametrize("overlay", ["aws", "gcp"])
def test_only_extract_workers_take_gpus_and_workers_run_on_spot(overlay: str) -> None:
    for pod in pods(overlay):
        limits = pod.spec["containers"][0]["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == pod.origin.endswith("extract")
        if pod.labels.get("ray.io/node-type") == "worker":
            assert "spot" in str(pod.spec["nodeSelector"])
        else:
            assert "spot" not in str(pod.spec.get("nodeSelector"))


def pinned(package: str) -> str:
    pins = (CHECKOUT / "constraints.txt").read_text()
    match = re.search(rf"^{package}==(.+)$", pins, re.MULTILINE)
    assert match
    return match[1]


@every_overlay
def test_images_are_those_of_this_version(overlay: str) -> None:
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    for pod in pods(overlay):
        for container in pod.spec["containers"]:
            kind = "cuda" if pod.origin.endswith("extract") else "cpu"
            assert container["image"].endswith(f"featurex-ray:{version}-{kind}"), pod.origin


@every_overlay
def test_every_container_has_requests_limits_and_a_place_to_write(overlay: str) -> None:
    for pod in pods(overlay):
        mounts = [m["mountPath"] for c in pod.spec["containers"] for m in c["volumeMounts"]]
        assert "/tmp" in mounts
        if pod.labels.get("ray.io/node-type") == "worker":
            assert "/spill" in mounts
        for container in pod.spec["containers"]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) & set(resources["limits"]), pod.origin
            assert container["securityContext"]["readOnlyRootFilesystem"], pod.origin
        for volume in pod.spec["volumes"]:
            assert volume.get("projected") or volume["emptyDir"]["sizeLimit"]


@every_overlay
def test_the_cloud_role_goes_to_head_and_workers_only(overlay: str) -> None:
    accounts = {o["metadata"]["name"]: o for o in render(overlay) if o["kind"] == "ServiceAccount"}
    for pod in pods(overlay):
        account = accounts[pod.spec["serviceAccountName"]]
        is_head = pod.labels.get("ray.io/node-type") == "head"
        assert account["automountServiceAccountToken"] == is_head
        assert pod.spec.get("automountServiceAccountToken", is_head) == is_head
        if overlay == "aws":
            assert ("annotations" in account["metadata"]) == ("ray.io/node-type" in pod.labels)
        if overlay == "gcp":
            assert ("store-token" in str(pod.spec)) == ("ray.io/node-type" in pod.labels)


# -- Network ---------------------------------------------------------------------------------


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, "the evaluator knows no other selectors"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def peer_allows(peer: Manifest, target: str | dict[str, str], namespace: str) -> bool:
    """Whether a peer of a rule covers an address, or a pod with these labels in a namespace."""
    if isinstance(target, str):
        block = peer.get("ipBlock")
        inside = block is not None and ip_address(target) in ip_network(block["cidr"])
        return inside and not any(ip_address(target) in ip_network(n) for n in block.get("except", []))
    if "ipBlock" in peer:
        return False
    there = {"kubernetes.io/metadata.name": namespace}
    same = (
        matches(peer["namespaceSelector"], there) if "namespaceSelector" in peer else namespace == "featurex"
    )
    return same and matches(peer.get("podSelector", {}), target)


def allowed(
    overlay: str,
    pod: Pod,
    direction: str,
    target: str | dict[str, str],
    port: int,
    *,
    namespace: str = "featurex",
    protocol: str = "TCP",
) -> bool:
    """What Kubernetes would decide: some policy that selects the pod has a rule for it."""
    kind = direction.capitalize()
    policies = [o["spec"] for o in render(overlay) if o["kind"] == "NetworkPolicy"]
    mine = [s for s in policies if kind in s["policyTypes"] and matches(s["podSelector"], pod.labels)]
    assert mine, "no policy selects the pod: everything is allowed"
    peers = "from" if direction == "ingress" else "to"
    return any(
        any(peer_allows(peer, target, namespace) for peer in rule[peers])
        and any(
            p["port"] == port and p["protocol"] == protocol
            for p in rule.get("ports", [{"port": port, "protocol": protocol}])
        )
        for spec in mine
        for rule in spec.get(direction, [])
    )


DNS = {"k8s-app": "kube-dns"}
STORE = "52.216.1.1"


@every_overlay
def test_no_pod_reaches_the_metadata_service(overlay: str) -> None:
    for pod in pods(overlay):
        for port in (80, 443, 988, 6443, 8080):
            assert not allowed(overlay, pod, "egress", METADATA_SERVICE, port), pod.origin


@every_overlay
def test_ray_reaches_dns_the_store_and_itself_and_nothing_else(overlay: str) -> None:
    head = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
    for pod in pods(overlay):
        is_ray = "ray.io/node-type" in pod.labels
        assert allowed(overlay, pod, "egress", DNS, 53, namespace="kube-system", protocol="UDP")
        assert allowed(overlay, pod, "egress", STORE, 443) == is_ray
        assert not allowed(overlay, pod, "egress", STORE, 80)
        assert not allowed(overlay, pod, "egress", STORE, 22)
        assert allowed(overlay, pod, "egress", head, 8265)
        assert allowed(overlay, pod, "egress", head, 6379) == is_ray
        assert not allowed(overlay, pod, "egress", {"app": "other"}, 8265, namespace="default")
        assert allowed(overlay, pod, "egress", "10.0.0.1", 6443) == (
            pod.labels.get("ray.io/node-type") == "head"
        )


@every_overlay
def test_only_submitters_the_operator_and_prometheus_come_in(overlay: str) -> None:
    for pod in pods(overlay):
        is_head = pod.labels.get("ray.io/node-type") == "head"
        is_ray = "ray.io/node-type" in pod.labels
        submit = {"app.kubernetes.io/component": "submit"}
        assert allowed(overlay, pod, "ingress", submit, 8265) == is_head
        assert not allowed(overlay, pod, "ingress", submit, 6379)
        assert allowed(overlay, pod, "ingress", {}, 8265, namespace="kuberay-system") == is_head
        assert allowed(overlay, pod, "ingress", {}, 8080, namespace="monitoring") == is_ray
        assert not allowed(overlay, pod, "ingress", {}, 8265, namespace="default")
        assert not allowed(overlay, pod, "ingress", STORE, 8265)


def test_the_local_overlay_reaches_its_own_store() -> None:
    worker = next(pod for pod in pods("local") if pod.labels.get("ray.io/node-type") == "worker")
    assert allowed("local", worker, "egress", {}, 9000, namespace="store")
    assert not allowed("aws", worker, "egress", {}, 9000, namespace="store")


# -- The nightly job -------------------------------------------------------------------------


@every_overlay
def test_the_nightly_job_has_a_time_zone_never_overlaps_and_keeps_a_history(overlay: str) -> None:
    nightly, plain = find(overlay, "RayCronJob")["spec"], find(overlay, "CronJob")["spec"]
    for spec in (nightly, plain):
        assert spec["timeZone"] == "Etc/UTC"
        assert re.fullmatch(r"\d+ \d+ \* \* \*", spec["schedule"])
    # Not both at once; RayCronJob has no concurrencyPolicy: a run ends before the next one's hour.
    assert (nightly["suspend"], plain["suspend"]) == (False, True)
    assert nightly["jobTemplate"]["activeDeadlineSeconds"] < 24 * 3600
    assert plain["concurrencyPolicy"] == "Forbid"
    assert plain["successfulJobsHistoryLimit"] > 0 < plain["failedJobsHistoryLimit"]
    rules = nightly["jobTemplate"]["deletionStrategy"]["deletionRules"]
    for condition in ({"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"}):
        ttl = {
            rule["policy"]: rule["condition"]["ttlSeconds"]
            for rule in rules
            if condition.items() <= rule["condition"].items()
        }
        assert ttl["DeleteSelf"] > ttl["DeleteCluster"], "KubeRay refuses rules that can't both apply"


@every_overlay
def test_a_waiting_run_does_not_start_by_itself(overlay: str) -> None:
    spec = find(overlay, "RayJob")["spec"]
    assert spec["suspend"]
    assert spec["shutdownAfterJobFinishes"], "KubeRay refuses to suspend a job otherwise"
