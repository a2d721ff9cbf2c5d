"""Every method on three families, whole: what the compatibility table says of all families by `make compatibility`."""

from __future__ import annotations

import re

import pytest

import hasten
from compatible import METHODS, alone
from hasten import Recipe
from pipelines import PIPELINES

FAMILIES = {
    "hunyuandit": pytest.mark.system("hunyuan-dit"),
    "pixart": pytest.mark.system("pixart-alpha"),
    "sd": pytest.mark.system("stable-diffusion"),
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


@pytest.mark.system("stable-diffusion")
def test_at_64_by_64_latents_the_handle_says_what_reuse_gains() -> None:
    """benchmarks/unet.py measures it at Stable Diffusion's own widths."""
    family = NAMED["sd"]
    pipe = family.build()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.deep": {"every": 3}}]})) as handle:
        out = family.call(pipe, height=128, width=128)
        told = str(handle)
    assert out.shape[-2:] == (64, 64)
    found = re.search(r"reuse: (\S+)x foretold, (\S+)x measured", told)
    assert found, told
    assert float(found[1]) > 1.3
    assert 0.5 < float(found[2]) < 2 * float(found[1])
