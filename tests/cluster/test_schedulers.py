"""The examples for schedulers: each is parsed, rendered and held to the rules of the cluster's own pods."""

import re
import runpy
import shlex
import subprocess
import sys
import types
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from featurex_ray.cli import cli
from tests.cluster.rendered import CHECKOUT, OVERLAYS, Manifest, find
from tests.cluster.test_pod_security import RULES, Rule

SCHEDULERS = CHECKOUT / "cluster" / "schedulers"


def airflow() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the DAG file gives to Airflow, which need not be installed for that: the DAG, the operator."""
    given: list[dict[str, Any]] = []

    class Recorded:
        def __init__(self, **arguments: Any) -> None:
            given.append(arguments)

        def __enter__(self) -> "Recorded":
            return self

        def __exit__(self, *_: object) -> None:
            """Nothing."""

    pod = "airflow.providers.cncf.kubernetes.operators.pod"
    names = ["airflow", *(pod[: match.start()] for match in re.finditer(r"\.", pod)), pod]
    before = {name: sys.modules.get(name) for name in names}
    try:
        sys.modules.update({name: types.ModuleType(name) for name in names})
        vars(sys.modules["airflow"])["DAG"] = Recorded
        vars(sys.modules[pod])["KubernetesPodOperator"] = Recorded
        runpy.run_path(str(SCHEDULERS / "airflow_dag.py"))
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    dag, operator = given
    return dag, operator


def airflow_pod() -> Manifest:
    _, operator = airflow()
    pod: Manifest = operator["pod_template_dict"]
    pod["spec"]["containers"][0]["args"] = operator["arguments"]
    return pod


def argo() -> Manifest:
    found: Manifest
    found, _ = yaml.safe_load_all((SCHEDULERS / "argo.yaml").read_text())
    return found


def argo_pod() -> Manifest:
    spec = argo()["spec"]["workflowSpec"]
    (template,) = spec["templates"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": template["metadata"],
        "spec": {
            "serviceAccountName": spec["serviceAccountName"],
            "securityContext": spec["securityContext"],
            "containers": [{"name": "main", **template["container"]}],
            "volumes": template["volumes"],
        },
    }


PODS = {"airflow": airflow_pod, "argo": argo_pod}


@pytest.mark.parametrize("scheduler", PODS)
def test_pods_hold_against_kubernetes_schema(scheduler: str) -> None:
    pod = PODS[scheduler]()
    kubernetes_validate.validate(pod | {"metadata": {"name": "p", **pod["metadata"]}}, "1.37", strict=True)
    assert pod["metadata"]["labels"]["app.kubernetes.io/component"] == "submit"


@pytest.mark.parametrize("scheduler", PODS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_pods_keep_the_restricted_standard(rule: Rule, scheduler: str) -> None:
    assert rule(PODS[scheduler]()["spec"])


def test_argo_may_report_and_still_not_reach_the_metadata_service() -> None:
    _, policy = yaml.safe_load_all((SCHEDULERS / "argo.yaml").read_text())
    kubernetes_validate.validate(policy, "1.37", strict=True)
    (rule,) = policy["spec"]["egress"]
    assert [peer["ipBlock"]["except"] for peer in rule["to"]] == [["169.254.169.254/32"]]


def test_airflow_runs_it_each_night_one_at_a_time_and_again_when_it_fails() -> None:
    dag, operator = airflow()
    assert dag["max_active_runs"] == 1
    assert not dag["catchup"]
    assert dag["start_date"].tzinfo is not None
    assert operator["retries"] > 0


def test_argo_has_a_time_zone_and_never_overlaps() -> None:
    spec = argo()["spec"]
    assert (spec["timezone"], spec["concurrencyPolicy"]) == ("Etc/UTC", "Forbid")
    assert spec["workflowSpec"]["activeDeadlineSeconds"] < 24 * 3600
    assert {template["name"] for template in spec["workflowSpec"]["templates"]} == {"backfill"}


def crontab() -> tuple[list[str], str]:
    """The five time fields of the one job, and its command as cron hands it to the shell."""
    lines = (SCHEDULERS / "crontab").read_text().splitlines()
    (line,) = [line for line in lines if line and line[0] in "0123456789*"]
    *fields, command = line.split(maxsplit=5)
    assert not re.search(r"(?<!\\)%", command), "cron would break the line there"
    return fields, command.replace("\\%", "%")


def test_crontab_is_nightly_and_its_command_is_one_that_bash_reads() -> None:
    fields, command = crontab()
    assert re.fullmatch(r"\d+ \d+ \* \* \*", " ".join(fields))
    subprocess.run(["bash", "-n", "-c", command], check=True)
    inner = shlex.split(command)
    subprocess.run(["bash", "-n", "-c", inner[-1]], check=True)
    assert inner[:2] == ["flock", "--nonblock"]


def entrypoints() -> dict[str, str]:
    """Every command of ours that a file hands to a shell, by where it stands."""
    found = {"crontab": shlex.split(crontab()[1])[-1].replace("$FEATUREX", "featurex")}
    for name, pod in PODS.items():
        found[name] = pod()["spec"]["containers"][0]["args"][0]
    for overlay in OVERLAYS:
        found[f"{overlay}/RayJob"] = find(overlay, "RayJob")["spec"]["entrypoint"]
        found[f"{overlay}/RayCronJob"] = find(overlay, "RayCronJob")["spec"]["jobTemplate"]["entrypoint"]
        cron = find(overlay, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        found[f"{overlay}/CronJob"] = cron["containers"][0]["args"][0]
    return found


WHERE = ["crontab", *PODS, *(f"{o}/{kind}" for o in OVERLAYS for kind in ("RayJob", "RayCronJob", "CronJob"))]


@pytest.mark.parametrize("where", WHERE)
def test_commands_name_a_job_and_options_that_are_there(where: str) -> None:
    """As the shell would split them, with dates in place of what computes them."""
    text = re.sub(r'"?\$\(date[^)]*\)"?|\{\{.*?\}\}', "2026-01-02", entrypoints()[where])
    match = re.search(r"(?:python /app/jobs/(\w+)\.py|featurex (\w+)) (.*?)(?: >|$)", text)
    assert match, text
    name = match[1] or match[2]
    if name not in cli.commands:
        pytest.skip(f"this version has no {name}")
    if match[1]:
        assert (CHECKOUT / "jobs" / f"{name}.py").is_file()
    command = cli.commands[name]
    command.make_context(name, shlex.split(match[3]), parent=click.Context(cli))
