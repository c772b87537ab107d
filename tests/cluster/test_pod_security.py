"""The Pod Security Standard "restricted", rule by rule, for every pod that the overlays lead to."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.rendered import OVERLAYS, Manifest, find, pods

RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SAFE_SYSCTLS = {"net.ipv4.ip_local_port_range", "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range"}
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
APPARMOR_TYPES = {None, "RuntimeDefault", "Localhost"}
SECCOMP_TYPES = {"RuntimeDefault", "Localhost"}


def containers(spec: Manifest) -> list[Manifest]:
    return [
        *spec["containers"],
        *spec.get("initContainers", []),
        *spec.get("ephemeralContainers", []),
    ]


def contexts(spec: Manifest) -> list[Manifest]:
    """The pod's security context and each container's."""
    return [spec.get("securityContext", {}), *(c.get("securityContext", {}) for c in containers(spec))]


def of_each(spec: Manifest, name: str) -> list[Any]:
    """A field of each container's security context, or the pod's where the container has none."""
    default = spec.get("securityContext", {}).get(name)
    return [c.get("securityContext", {}).get(name, default) for c in containers(spec)]


def host_namespaces(spec: Manifest) -> bool:
    return not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))


def host_process(spec: Manifest) -> bool:
    return not any(c.get("windowsOptions", {}).get("hostProcess") for c in contexts(spec))


def privileged(spec: Manifest) -> bool:
    return not any(c.get("privileged") for c in contexts(spec))


def capabilities(spec: Manifest) -> bool:
    found = [c.get("securityContext", {}).get("capabilities", {}) for c in containers(spec)]
    return all("ALL" in f.get("drop", []) and set(f.get("add", [])) <= {"NET_BIND_SERVICE"} for f in found)


def volume_types(spec: Manifest) -> bool:
    return all(set(volume) - {"name"} <= RESTRICTED_VOLUMES for volume in spec.get("volumes", []))


def host_ports(spec: Manifest) -> bool:
    return not any(port.get("hostPort") for c in containers(spec) for port in c.get("ports", []))


def host_probes(spec: Manifest) -> bool:
    """No probe or hook may name a host."""

    def hosts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for kind, action in value.items():
                if kind in ("httpGet", "tcpSocket") and action.get("host"):
                    yield action["host"]
                yield from hosts(action)

    names = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle")
    return not any(list(hosts(c.get(name, {}))) for c in containers(spec) for name in names)


def app_armor(spec: Manifest) -> bool:
    return all(c.get("appArmorProfile", {}).get("type") in APPARMOR_TYPES for c in contexts(spec))


def selinux(spec: Manifest) -> bool:
    found = [c.get("seLinuxOptions", {}) for c in contexts(spec)]
    return all(f.get("type") in SELINUX_TYPES and not f.get("user") and not f.get("role") for f in found)


def proc_mount(spec: Manifest) -> bool:
    return all(c.get("procMount") in (None, "Default") for c in contexts(spec))


def sysctls(spec: Manifest) -> bool:
    return all(s["name"] in SAFE_SYSCTLS for s in spec.get("securityContext", {}).get("sysctls", []))


def privilege_escalation(spec: Manifest) -> bool:
    return all(
        c.get("securityContext", {}).get("allowPrivilegeEscalation") is False for c in containers(spec)
    )


def non_root(spec: Manifest) -> bool:
    return all(value is True for value in of_each(spec, "runAsNonRoot"))


def non_root_user(spec: Manifest) -> bool:
    return all(c.get("runAsUser") != 0 for c in contexts(spec))


def seccomp(spec: Manifest) -> bool:
    return all((profile or {}).get("type") in SECCOMP_TYPES for profile in of_each(spec, "seccompProfile"))


Rule = Callable[[Manifest], bool]

VIOLATIONS: list[tuple[Rule, Manifest, Manifest]] = [
    (host_namespaces, {"hostPID": True}, {}),
    (host_process, {}, {"securityContext": {"windowsOptions": {"hostProcess": True}}}),
    (privileged, {}, {"securityContext": {"privileged": True}}),
    (capabilities, {}, {"securityContext": {"capabilities": {"drop": ["ALL"], "add": ["SYS_PTRACE"]}}}),
    (capabilities, {}, {"securityContext": {}}),
    (volume_types, {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, {}),
    (host_ports, {}, {"ports": [{"containerPort": 80, "hostPort": 80}]}),
    (host_probes, {}, {"livenessProbe": {"httpGet": {"host": "10.0.0.1", "port": 80}}}),
    (host_probes, {}, {"lifecycle": {"preStop": {"tcpSocket": {"host": "10.0.0.1", "port": 80}}}}),
    (app_armor, {}, {"securityContext": {"appArmorProfile": {"type": "Unconfined"}}}),
    (selinux, {"securityContext": {"seLinuxOptions": {"user": "root"}}}, {}),
    (proc_mount, {}, {"securityContext": {"procMount": "Unmasked"}}),
    (sysctls, {"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}}, {}),
    (privilege_escalation, {}, {"securityContext": {}}),
    (non_root, {"securityContext": {}}, {"securityContext": {}}),
    (non_root_user, {}, {"securityContext": {"runAsUser": 0}}),
    (seccomp, {}, {"securityContext": {"seccompProfile": {"type": "Unconfined"}}}),
    (seccomp, {"securityContext": {}}, {"securityContext": {}}),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in VIOLATIONS))


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_pod_keeps_the_rule(rule: Rule, overlay: str) -> None:
    found = list(pods(overlay))
    assert len(found) >= 9
    assert [pod.origin for pod in found if not rule(pod.spec)] == []


@pytest.mark.parametrize(("rule", "of_pod", "of_container"), VIOLATIONS)
def test_a_pod_that_breaks_the_rule_fails(rule: Rule, of_pod: Manifest, of_container: Manifest) -> None:
    spec = copy.deepcopy(next(pods("aws")).spec) | of_pod
    spec["containers"][0] |= of_container
    assert not rule(spec)


def test_the_namespace_enforces_the_standard() -> None:
    labels = find("aws", "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
