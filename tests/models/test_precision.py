"""Precision: what is asked for stays, what is auto follows the hardware."""

from pathlib import Path

import pytest

from featurex_ray.models.precision import resolve_precision


def test_what_is_asked_for_stays() -> None:
    assert [resolve_precision(p, gpu=False) for p in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]


def test_auto_follows_the_cpu() -> None:
    facts = Path("/proc/cpuinfo")
    if not facts.exists():
        pytest.skip("the CPU's flags are only told on Linux")
    fast = {"amx_bf16", "avx512_bf16"} & set(facts.read_text().split())
    assert resolve_precision("auto", gpu=False) == ("bf16" if fast else "fp32")
