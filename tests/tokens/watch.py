"""Watching attention from outside: the lengths that it runs on, and every tiny family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.overrides import TorchFunctionMode

import hasten
from families import Family
from families_more import MORE
from hasten.method import Refused
from pipelines import PIPELINES

EVERY = [pytest.param(f, id=f.name) for f in (*PIPELINES, *MORE)]
BY_NAME = {f.name: f for f in (*PIPELINES, *MORE)}


class Seen(TorchFunctionMode):
    """Within it, `lengths` gathers (queries, keys) of each attention, and `flops` what it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[tuple[int, int]] = []
        self.costs: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is attend:
            given = dict(zip(("query", "key", "value"), args)) | kwargs
            q, k = given["query"], given["key"]
            self.lengths.append((q.shape[-2], k.shape[-2]))
            self.costs.append(4 * q.numel() * k.shape[-2])
        return func(*args, **kwargs)


def applied(pipe: Any, label: str, **settings: Any) -> hasten.Handle:
    """Skips where the method refuses the network, with a sentence."""
    try:
        return hasten.accelerate(pipe, hasten.Recipe.from_dict({"methods": [{label: settings}]}))
    except Refused as refused:
        assert len(str(refused)) > 40
        pytest.skip(f"refused: {refused}")


def tallied(handle: hasten.Handle) -> dict[str, int]:
    return {k: v for _, patch in handle.patches for k, v in patch.tally.items()}


def holds_on(family: Family, label: str, neutral: dict[str, Any], idle: dict[str, Any], busy: dict[str, Any]) -> None:
    """Neutral settings change no bit; nor does the edit itself, at `idle` settings where all is in place and nothing
    to do; at `busy` ones the sample changes, twice alike; removal gives back every bit."""
    pipe = family.build()
    steps = {"num_inference_steps": 3}
    before = family.call(pipe, **steps)
    with applied(pipe, label, **neutral):
        assert torch.equal(family.call(pipe, **steps), before)
    with applied(pipe, label, **idle):
        assert torch.equal(family.call(pipe, **steps), before)
    with applied(pipe, label, **busy) as handle:
        fast = family.call(pipe, **steps)
        assert not torch.equal(fast, before)
        assert torch.equal(family.call(pipe, **steps), fast)
        assert tallied(handle)
    assert torch.equal(family.call(pipe, **steps), before)
