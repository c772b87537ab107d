"""What nodes say of themselves before a run: what agrees, and what ends it."""

from pathlib import Path

import pytest

from featurex_ray.errors import RequestError
from featurex_ray.pipeline.preflight import Answer, answer, check, own_versions
from featurex_ray.table.store import open_store

OURS = {"python": "3.11", "ray": "2.60.0", "torch": "2.15.0+cpu"}


def test_nodes_that_agree_pass_whatever_their_torch_was_built_for() -> None:
    check([Answer("a", OURS, None), Answer("b", OURS | {"torch": "2.15.0"}, None)], OURS)


def test_a_node_with_other_versions_fails_and_all_of_them_are_named() -> None:
    other = OURS | {"ray": "2.59.0", "torch": "not installed"}
    with pytest.raises(
        RequestError, match=r"node b .*ray 2\.59\.0 there, 2\.60\.0 here; torch not installed"
    ):
        check([Answer("a", OURS, None), Answer("b", other, None)], OURS)


def test_a_node_that_cannot_reach_the_store_fails() -> None:
    with pytest.raises(RequestError, match="node b can't reach the output: OSError: no route"):
        check([Answer("b", OURS, "OSError: no route")], OURS)


def test_a_node_says_its_versions_and_that_the_store_is_there(tmp_path: Path) -> None:
    found = answer(open_store(str(tmp_path)))
    assert found.versions == own_versions()
    assert found.versions["ray"] != "not installed"
    assert found.store_error is None
