"""R3, R12, R14: a bad network, a careless store, and a store that goes away for a while."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from featurex_ray.table.store import open_store
from tests.faults.campaign import check_end, count_of, rows_of, tell_story
from tests.faults.conftest import Record
from tests.faults.proxy import BadNetwork, Proxy, careless_proxy, running
from tests.faults.reader import Reader, summary


def test_lost_requests_and_answers(
    s3_root: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """R3. Whatever the outcome of a request, nothing that a plan relies on is deleted after it."""
    oracle = rows_of(tell_story(str(tmp_path / "oracle")))
    seeds, faults, requests = count_of("R3", 2, 100), 0, 0
    with Reader() as reader:  # of the store itself: what it sees is what is there
        for seed in range(seeds):
            uri = f"{s3_root}/{seed}"
            reader.look_at(uri)
            deleted: list[str] = []

            def watch(operation: str, moment: str, key: str, deleted: list[str] = deleted) -> None:
                if (operation, moment) == ("delete", "before"):
                    deleted.append(key)

            proxy = BadNetwork(s3_server, seed=seed)
            proxy.timeout_seconds = 0.05
            with running(proxy):
                monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
                tell_story(uri, watch)
            monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
            check_end(uri, oracle)
            collected = ("_featurex/t/staging/", "_featurex/t/leases/", "_featurex/clock/")
            assert all(key.startswith(collected) for key in deleted), deleted
            requests += proxy.counts.pop("requests")
            faults += proxy.counts.total()
    reader.check()
    record(
        "R3",
        f"{seeds} seeds, {faults:,} faults in {requests:,} requests; rows = oracle, 0 lost, 0 duplicate; "
        f"meanwhile {summary(reader.counts)}",
    )


def test_a_careless_store_is_refused(
    s3_root: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """R12, as a user meets it, imports and all; `test_probe.py` holds the probe alone to its 10 s."""
    (tmp_path / "m.csv").write_text("uri,dataset\n/nowhere/a.png,d\n")
    with careless_proxy(s3_server) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        start = time.monotonic()
        command = f"extract {tmp_path}/m.csv --output {s3_root} --extractor attention_convnet".split()
        found = subprocess.run(
            [sys.executable, "-m", "featurex_ray.cli", *command], capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - start
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert found.returncode == 2, found.stderr
    assert "of 12 racing conditional writes not exactly one won" in found.stderr
    assert list(open_store(s3_root).list("")) == []
    record(
        "R12", f"extract refused a store that ignores conditions in {seconds:.1f} s, exit 2, nothing written"
    )


def test_the_store_is_away(
    s3_root: str, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """R14. The run waits, and goes on."""
    oracle = rows_of(tell_story(str(tmp_path / "oracle")))
    seconds = count_of("R14_SECONDS", 2, 60)
    proxy = Proxy(s3_server)

    def leave() -> None:
        proxy.away = True
        time.sleep(seconds)
        proxy.away = False

    def watch(operation: str, moment: str, key: str) -> None:
        if operation == "create" and key.startswith("t/") and not leaving.ident:
            leaving.start()

    leaving = threading.Thread(target=leave)
    with running(proxy):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        tell_story(f"{s3_root}/away", watch)
        leaving.join()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    check_end(f"{s3_root}/away", oracle)
    record(
        "R14 away",
        f"away for {seconds} s at the first publish, {proxy.counts['lost request']} requests lost: went on",
    )
