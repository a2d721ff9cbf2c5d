"""The handle tells the truth: what was patched, what was reused, and whether it paid."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import hasten
from families import FAMILIES
from hasten import Recipe
from hasten.anatomy import anatomy
from hasten.bridge.clock import Clock
from hasten.method import Method, Part, Refused, Stage, apply_all
from hasten.patch import Patch
from hasten.recipe import RecipeError
from hasten.tree import methods

SD3 = FAMILIES[2]


class Idle(Method):
    """Finds nothing."""

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"much": 0}
    much: int = 1

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            return patch.keep()


def test_a_method_that_patched_nothing_is_refused_and_those_before_are_taken_back() -> None:
    net = SD3.build().transformer
    bf16 = methods()["runtime.bf16"]()
    with pytest.raises(Refused, match="found nothing to change in SD3Transformer2DModel: leave it out"):
        apply_all([bf16, Idle()], net)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert [len(p.sites) for _, p in apply_all([Idle(much=0)], net)] == [0]  # as it was told


def test_gain_is_of_the_calls_that_were() -> None:
    """Four calls at 20 ms and eight at 5 ms take 120 ms, where twelve at 20 would take 240."""
    clock = Clock(None)
    assert clock.gain() is None
    clock.full.extend([0.02] * 4)
    assert clock.gain() is None
    clock.short.extend([0.005] * 8)
    assert clock.gain() == pytest.approx(2.0)


def slowed(pipe: Any, place: Any, seconds: float) -> None:
    inner = place.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return inner(*args, **kwargs)

    place.forward = forward


def test_reuse_that_pays_is_told_with_its_factor() -> None:
    """Blocks that take 10 ms each and are left out at two steps of three: about a third of the time is left."""
    pipe = SD3.build()
    for block in anatomy(pipe.transformer).blocks:
        slowed(pipe, block.module.attn, 0.01)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.interval": {"every": 3}}]})) as handle:
        SD3.call(pipe)
        said = str(handle).splitlines()[-1]
        assert handle.clock is not None
        gain = handle.clock.gain()
    assert gain is not None
    assert 1.5 < gain < 3
    assert said == f"  reuse: 3.00x foretold, {gain:.2f}x measured"


def test_reuse_that_costs_more_than_it_saves_says_so() -> None:
    pipe = SD3.build()
    recipe = Recipe.from_dict({"methods": [{"cache.interval": {"every": 3}}]})
    with hasten.accelerate(pipe, recipe) as handle:
        SD3.call(pipe)
        assert handle.clock is not None
        handle.clock.short.clear()
        handle.clock.short.extend([1.0] * 8)  # as where looking at what was kept takes longer than computing it
        assert str(handle).endswith("x measured; slower than without: leave it out")


@pytest.mark.parametrize("label", ["cache.interval", "runtime.bf16", "guidance.interval"])
def test_copies_and_folders_of_an_accelerated_pipeline_are_refused(label: str, tmp_path: Path) -> None:
    """A deep copy would run the original's edits on the original's weights; a folder would hold edited weights."""
    pipe = SD3.build()
    plain = SD3.call(pipe)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [label]})) as handle:
        for thing in (pipe, pipe.transformer):
            with pytest.raises(RecipeError, match="a copy would share its edits"):
                copy.deepcopy(thing)
            with pytest.raises(RecipeError, match=r"call handle.remove\(\) first"):
                thing.save_pretrained(tmp_path / "here")
        assert not (tmp_path / "here").exists()
        assert "guard" not in str(handle)
    assert torch.equal(SD3.call(copy.deepcopy(pipe)), plain)
    pipe.transformer.save_pretrained(tmp_path / "here")
    assert (tmp_path / "here" / "config.json").exists()
    net = SD3.build().transformer
    with (
        hasten.accelerate(net, Recipe.from_dict({"methods": [label]})),
        pytest.raises(RecipeError, match="a copy would share its edits"),
    ):
        copy.deepcopy(net)


FAULTY = [{"cache.interval": {"every": 2}}, {"cache.first_block": {"threshold": 0.5}}, {"cache.taylor": {"every": 2}}]


@pytest.mark.parametrize("method", FAULTY, ids=lambda m: next(iter(m)))
def test_a_nan_in_what_was_kept_does_not_outlive_its_picture(method: dict[str, Any]) -> None:
    pipe = SD3.build()
    last = anatomy(pipe.transformer).blocks[-1].module
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [method]})):
        want = SD3.call(pipe)
        hook = last.attn.register_forward_hook(
            lambda _, args, out: (
                tuple(torch.full_like(o, torch.nan) for o in out)
                if isinstance(out, tuple)
                else torch.full_like(out, torch.nan)
            )
        )
        assert SD3.call(pipe).isnan().any()
        hook.remove()
        assert torch.equal(SD3.call(pipe), want)


@pytest.mark.parametrize("method", FAULTY, ids=lambda m: next(iter(m)))
def test_two_pipelines_in_two_threads_do_not_meet(method: dict[str, Any]) -> None:
    """Each draws, at the same time as the other, what it draws alone."""
    pipes = [SD3.build(), SD3.build()]
    handles = [hasten.accelerate(p, Recipe.from_dict({"methods": [method]})) for p in pipes]
    seeds = (1, 2)

    def drawn(i: int) -> list[torch.Tensor]:
        return [SD3.call(pipes[i], generator=torch.Generator().manual_seed(seeds[i])) for _ in range(3)]

    alone = [drawn(0), drawn(1)]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(drawn, (0, 1)))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for one, two in zip(alone, both, strict=True) for a, b in zip(one, two, strict=True))
