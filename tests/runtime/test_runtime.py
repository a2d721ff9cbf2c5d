"""bf16 and compilation: near the untouched output, exact after removal, and told where they can't be had."""

from __future__ import annotations

import pytest
import torch

import hasten
from families import FAMILIES, Family
from hasten import Recipe
from hasten.method import Refused
from hasten.runtime.compile import _compiler_or_refuse

SD3 = FAMILIES[2]


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_bf16_is_near_and_keeps_the_callers_precision(family: Family) -> None:
    pipe = family.build()
    plain = family.call(pipe)
    net = getattr(pipe, "unet", None) or pipe.transformer
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": ["runtime.bf16"]})):
        assert torch.bfloat16 in {p.dtype for p in net.parameters()}
        near = family.call(pipe)
    assert near.dtype == plain.dtype
    assert torch.nn.functional.cosine_similarity(near.flatten(), plain.flatten(), 0) > 0.99
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_compiled_blocks_give_the_same_sample_and_go_without_a_trace() -> None:
    """With a cache outside the compiled blocks: as the same without compilation, and exact after removal."""
    torch._dynamo.reset()
    pipe = SD3.build()
    plain = SD3.call(pipe)
    methods = [{"cache.interval": {"every": 2}}]
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": methods})):
        eager = SD3.call(pipe)
    with torch._inductor.config.patch(compile_threads=1):
        handle = hasten.accelerate(pipe, Recipe.from_dict({"methods": [*methods, "runtime.compile"]}))
        compiled = SD3.call(pipe)
        assert torch.equal(SD3.call(pipe), compiled)
        handle.remove()
    assert (compiled - eager).abs().max() < 1e-4 * eager.abs().max()
    assert torch.equal(SD3.call(pipe), plain)
    assert all("forward" not in vars(m) for m in pipe.transformer.modules())


def test_compile_is_refused_without_a_compiler() -> None:
    with pytest.raises(Refused, match="install g"):
        _compiler_or_refuse("cpu", which=lambda name: None)
    _compiler_or_refuse("cuda", which=lambda name: None)
