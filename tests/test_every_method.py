"""Every method on two families, whole: what the compatibility table says of all families by `make compatibility`."""

from __future__ import annotations

import pytest

from compatible import METHODS, alone
from pipelines import PIPELINES

FAMILIES = {
    "hunyuandit": pytest.mark.system("hunyuan-dit"),
    "pixart": pytest.mark.system("pixart-alpha"),
}
NAMED = {f.name: f for f in PIPELINES}
SERVED = {
    "cache.interval",
    "cache.tgate",
    "cache.tea",
    "tokens.merge",
    "quant.w8a8",
    "attention.exact",
    "attention.sla",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=mark) for n, mark in FAMILIES.items()])
@pytest.mark.parametrize("label", [m for m in METHODS if m != "runtime.compile"])
def test_it_is_exact_at_its_neutral_setting_and_gone_after_removal(label: str, name: str) -> None:
    found = alone(label, NAMED[name])
    assert found["restored"]
    assert found.get("neutral", True)
    if label in SERVED:
        assert found["moved"] > 0
    if "refused" in found:
        assert len(found["refused"]) > 40
