"""What a person sees of rows and progress."""

import csv
import io

import pyarrow as pa
import pytest
from click.testing import CliRunner

from featurex_ray.cli import cli
from featurex_ray.console import print_rows, show
from featurex_ray.pipeline.progress import Lines
from featurex_ray.table import read


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["set[final].jpg", "a[/b].jpg", "urn:cat:7"]
    print_rows([{"sample_id": name, "labels": ["photos", "clips"]} for name in names], title="[all] of them")
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*names, "[photos, clips]", "[all] of them"])


def test_numbers_keep_what_they_say() -> None:
    assert [show(value) for value in (3723.5, 0.99934, 0.5, 12)] == ["3723.5", "0.99934", "0.5", "12"]
    assert show([0.123456, 2.0]) == "[0.123, 2]"


@pytest.mark.parametrize(
    ("form", "wanted"), [("json", '{"similarity": 0.25}\n'), ("csv", "similarity\n0.25\n")]
)
def test_search_has_the_formats_of_query(form: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        def search(self, **_: object) -> pa.Table:
            return pa.table({"similarity": [0.25]})

    monkeypatch.setattr(read, "open_table", lambda _: Table())
    done = CliRunner().invoke(cli, ["search", "table", "--sample", "a", "--format", form])
    assert done.output == wanted


def test_features_are_whole_in_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table:
        def query(self, _: str) -> pa.Table:
            return pa.table(
                {"sample_id": ["a,b"], "feature": [[i / 7 for i in range(2048)]], "label": [None]}
            )

    monkeypatch.setattr(read, "open_table", lambda _: Table())
    done = CliRunner().invoke(cli, ["query", "table", "SELECT *", "--format", "csv"])
    (names, row) = csv.reader(io.StringIO(done.output))
    assert names == ["sample_id", "feature", "label"]
    assert (row[0], row[2], len(row[1].split(","))) == ("a,b", "", 2048)


def test_progress_goes_on_in_a_second_round() -> None:
    lines = Lines()
    lines.begin(10)
    lines.advance(samples=10, clips=10, failed=0)
    lines.begin(4)
    lines.advance(samples=1, clips=1, failed=0)
    assert lines._counts.line().startswith("11/14 samples")
    assert (lines._counts.seconds_left or 0) > 0


@pytest.mark.parametrize(
    "command",
    [
        "attend --image a.jpg --extractor attention_convnet --output nowhere/a.png",
        "benchmark --no-ray --json nowhere/f.json",
    ],
)
def test_results_that_have_nowhere_to_go_are_refused_before_the_work(command: str) -> None:
    done = CliRunner().invoke(cli, command.split())
    assert (done.exit_code, "there is no folder" in done.output) == (2, True)
