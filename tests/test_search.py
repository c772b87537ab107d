"""Search by an image: with the extractor that made the table, or not at all."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from featurex_ray.cli import cli
from featurex_ray.demo import MEDIA
from featurex_ray.errors import RequestError, RevisionMismatchError
from featurex_ray.models.registry import resolve
from featurex_ray.search import search_image
from featurex_ray.table import TableFacts, open_store
from featurex_ray.table.read import TableReader

SETTINGS: dict[str, Any] = {"sampling": "uniform:16", "clip": None, "precision": "fp32", "decoder": "pyav"}


def reader(folder: Path, *, revision: str | None = None) -> TableReader:
    """A table without rows."""
    spec = resolve("attention_convnet").spec
    facts = TableFacts(
        name="t",
        revision=revision or spec.revision(**SETTINGS),
        dimension=spec.dimension,
        extractor=spec.to_json() | SETTINGS,
    )
    return TableReader(open_store(str(folder)), facts)


def test_the_extractor_that_made_the_table_embeds(tmp_path: Path) -> None:
    assert search_image(reader(tmp_path), str(MEDIA / "images/chelsea.jpg"), k=1).num_rows == 0


def test_another_revision_with_the_same_weights_fails(tmp_path: Path) -> None:
    table = reader(tmp_path, revision="0123456789abcdef")
    here = resolve("attention_convnet").spec.revision(**SETTINGS)
    with pytest.raises(
        RevisionMismatchError, match=f"has revision {here} here, and the table was made with 0123456789abcdef"
    ):
        search_image(table, str(MEDIA / "images/chelsea.jpg"), k=1)


def test_signatures_are_not_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--image https://host/a\?\*\*\*: refused_uri") as refused:
        search_image(reader(tmp_path), "https://host/a?X-Amz-Signature=secret", k=1)
    assert "secret" not in str(refused.value)


def test_a_dataset_is_no_part_of_a_search_by_image(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli, ["search", str(tmp_path), "--image", "a.png", "--dataset", "d"])
    assert (found.exit_code, "--dataset says which --sample is meant" in found.output) == (2, True)
