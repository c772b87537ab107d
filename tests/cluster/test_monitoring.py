"""Metrics, events and status: what dashboards name is what a run tells Ray's real Prometheus endpoint."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from featurex_ray.cli import cli
from featurex_ray.manifest import build_manifest
from featurex_ray.pipeline.metrics import METRICS
from tests.cluster.nodes import free_port
from tests.cluster.rendered import CHECKOUT

MONITORING = CHECKOUT / "cluster" / "monitoring"
KEYWORDS = {
    "and",
    "by",
    "le",
    "or",
    "sum",
    "max",
    "min",
    "avg",
    "count",
    "rate",
    "scalar",
    "histogram_quantile",
}

DRIVER = """
import os, sys
import ray
import featurex_ray as fx
from featurex_ray.pipeline.progress import console_progress
manifest, output, port, temp = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=temp,
         logging_level="ERROR",
         _metrics_export_port=int(port), _system_config={"metrics_report_interval_ms": 500})
fx.run(fx.ExtractionJob(manifest=manifest, output=output, extractor="tests.pipeline.own:SlowMean",
                        max_samples_per_plan=8), progress=console_progress())
sys.stdin.read()  # a scrape may come after the run's end: what it told last stays until then
"""


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression names: its words, without labels, ranges and functions."""
    bare = re.sub(r'\{[^}]*\}|\[[^\]]*\]|"[^"]*"|\b(by|without)\s*\([^)]*\)', " ", expression)
    return {word for word in re.findall(r"[a-zA-Z_:][a-zA-Z0-9_:]*", bare) if word not in KEYWORDS}


def test_names_in_an_expression() -> None:
    expression = (
        'histogram_quantile(0.5, sum by (le) (rate(ray_a_bucket{stage="x"}[5m]))) > 2 * scalar(ray_b)'
    )
    assert names_in(expression) == {"ray_a_bucket", "ray_b"}


def dashboard() -> Any:
    return json.loads((MONITORING / "dashboard.json").read_text())


def rules() -> list[Any]:
    (group,) = yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
    return list(group["rules"])


def all_expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return panels + [rule["expr"] for rule in rules()]


def named_by_all() -> set[str]:
    return set().union(*map(names_in, all_expressions()))


@dataclass(frozen=True)
class Run:
    """A run that was scraped while it went."""

    output: Path
    scraped: set[str]  # names of time series
    stderr: str
    worker_logs: str


def scrape(port: int) -> set[str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return set()  # not up yet, or already gone
    return {re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines if not line.startswith("#")}


def told(scraped: set[str]) -> set[str]:
    """The declared metrics that have time series."""
    return {name for name in METRICS if any(series.startswith(f"ray_{name}") for series in scraped)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("monitoring")
    (folder / "media").mkdir()
    for i in range(24):
        Image.new("RGB", (64, 48), (10 * i, 100, 50)).save(folder / "media" / f"{i:02d}.png")
    (folder / "media" / "broken.png").write_bytes(b"no image at all")
    build_manifest(str(folder / "media"), str(folder / "m.csv"), dataset="colours")
    port = free_port()
    temp = Path("/tmp") / f"ray-{port}"  # Ray's sockets need a short path
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder / "m.csv"), str(folder / "out"), str(port), str(temp)],
        cwd=CHECKOUT,
        env=os.environ | {"FEATUREX_LOG": "json", "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    scraped: set[str] = set()
    deadline = time.monotonic() + 400
    while not (named_by_all() <= scraped and told(scraped) == set(METRICS)):
        if driver.poll() is not None or time.monotonic() > deadline:
            break  # what is missing is for the tests to say
        scraped |= scrape(port)
        time.sleep(0.5)
    _, stderr = driver.communicate(timeout=200)
    assert driver.returncode == 0, stderr
    logs = "".join(p.read_text(errors="replace") for p in temp.glob("session_latest/logs/worker-*.err"))
    shutil.rmtree(temp, ignore_errors=True)
    return Run(folder / "out", scraped, stderr, logs)


def test_every_declared_metric_is_told(run: Run) -> None:
    assert set(METRICS) - told(run.scraped) == set()


def test_every_metric_of_panels_and_rules_is_there(run: Run) -> None:
    assert len(named_by_all()) >= len(METRICS)
    assert named_by_all() - run.scraped == set()


def test_every_declared_metric_is_shown() -> None:
    shown = " ".join(all_expressions())
    assert [name for name in METRICS if f"ray_{name}" not in shown] == []


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    found = dashboard()
    assert {"uid", "title", "schemaVersion", "panels", "templating"} <= set(found)
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    for panel in found["panels"]:
        assert panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_every_alert_says_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket", "info")
        assert {"summary", "action"} <= set(rule["annotations"])
        assert re.fullmatch(r"\d+m", rule["for"])


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]


def test_the_driver_writes_events_that_name_the_run(run: Run) -> None:
    found = events(run.stderr)
    last = [event for event in found if event["event"] == "progress"][-1]
    assert (last["samples"], last["num_samples"], last["failed"], last["seconds_left"]) == (25, 25, 1, 0)
    assert last["run_id"] == report(run)["run_id"]


def test_workers_write_events_with_run_plan_and_sample(run: Run) -> None:
    found = events(run.worker_logs)
    (failed,) = [event for event in found if event["event"] == "sample_failed"]
    assert failed["run_id"] == report(run)["run_id"]
    assert (failed["sample_id"], failed["dataset"]) == ("broken.png", "colours")
    assert (failed["stage"], failed["code"]) == ("probe", "unsupported_container")
    published = {event["plan_id"] for event in found if event["event"] == "plan_published"}
    assert failed["plan_id"] in published
    assert len(published) == 4


def report(run: Run) -> dict[str, Any]:
    (path,) = (run.output / "_featurex/tests.pipeline.own-SlowMean/runs").iterdir()
    return dict(json.loads(path.read_text()))


def test_status_needs_no_cluster(run: Run) -> None:
    found = CliRunner().invoke(cli, ["status", str(run.output), "--json"])
    assert found.exit_code == 0, found.output
    status = json.loads(found.output)
    assert status["open_plans"] == []
    (past,) = status["runs"]
    assert (past["run_id"], past["planned"], past["failed"]) == (report(run)["run_id"], 25, 1)
    assert report(run)["run_id"] in CliRunner().invoke(cli, ["status", str(run.output)]).output


def test_status_of_nothing_fails(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["status", str(tmp_path)])
    assert found.exit_code == 2
    assert "no feature table" in found.output
