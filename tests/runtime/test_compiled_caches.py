"""Caches and attentions inside compiled blocks: nothing has a block compiled anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from families import FAMILIES
from hasten import Recipe
from settings import strong

SD3 = FAMILIES[2]


@pytest.mark.parametrize("label", ["cache.broadcast", "cache.faster", "cache.feature", "cache.interval"])
def test_counters_do_not_have_blocks_compiled_anew(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both are what the cache alone makes, up to the rounding of fused arithmetic."""
    pipe = SD3.build()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [label]})):
        want = SD3.call(pipe)
    compiled: list[Any] = []

    def eager(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **more: plain(fn, backend=eager, **more))
    torch._dynamo.reset()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": ["runtime.compile", label]})):
        first = SD3.call(pipe)
        once = len(compiled)
        second = SD3.call(pipe)
    assert 0 < once < 10  # with what is counted among the guards there are twelve and more
    assert len(compiled) == once
    assert torch.equal(first, second)
    assert (first - want).abs().max() < 1e-5 * want.abs().max()


ATTENTIONS = ["attention.exact", "attention.linear", "attention.sla", "attention.sliding_tile", "attention.top_blocks"]


@pytest.mark.parametrize("label", ATTENTIONS)
def test_an_attention_is_compiled_with_its_block(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a kind of block, and the numbers of the method alone."""
    pipe, settings = SD3.build(), strong(label)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{label: settings}]})):
        want = SD3.call(pipe)
    graphs: list[Any] = []
    plain = torch.compile

    def eager(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda fn, **more: plain(fn, backend=eager, **more))
    torch._dynamo.reset()
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": ["runtime.compile", {label: settings}]})):
        first = SD3.call(pipe)
        once = len(graphs)
        assert torch.equal(SD3.call(pipe), first)
    assert len(graphs) == once
    assert once <= 2 * len({type(b) for b in pipe.transformer.transformer_blocks}) + 2
    assert (first - want).abs().max() < 1e-5 * want.abs().max()
