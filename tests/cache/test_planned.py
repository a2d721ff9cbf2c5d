"""A plan of full evaluations: those and no others run the blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import hasten
from families import FAMILIES
from hasten import Recipe, moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.method import Refused
from hasten.recipe import RecipeError

NAMED = {f.name: f for f in FAMILIES}


def planned(*compute: int, steps: int = 6, **more: Any) -> Recipe:
    return Recipe.from_dict({"methods": [{"cache.planned": {"compute": list(compute), "steps": steps, **more}}]})


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "pixart"])
def test_blocks_run_at_the_planned_evaluations_alone(name: str) -> None:
    pipe = NAMED[name].build()
    (net,) = networks(pipe).values()
    ran: Counter[int] = Counter()
    for block in anatomy(net).blocks:
        linear = next(m for m in block.module.modules() if isinstance(m, torch.nn.Linear))
        linear.register_forward_hook(lambda *_: ran.update([moment.now().step]))
    with hasten.accelerate(pipe, planned(0, 1, 4)):
        NAMED[name].call(pipe)
    assert set(ran) == {0, 1, 4}


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_every_second_is_what_the_interval_does(name: str) -> None:
    """On a DiT that is cache.interval, on a U-Net cache.deep, bit for bit."""
    pipe = NAMED[name].build()
    other = {"cache.interval": {"every": 2}} if name == "sd3" else {"cache.deep": {"every": 2, "branch": 1}}
    with hasten.accelerate(pipe, planned(0, 2, 4, branch=1)):
        got = NAMED[name].call(pipe)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [other]})):
        assert torch.equal(NAMED[name].call(pipe), got)


def test_a_plan_is_for_its_number_of_evaluations() -> None:
    pipe = NAMED["sd3"].build()
    with (
        hasten.accelerate(pipe, planned(0, 3, steps=8)),
        pytest.raises(Refused, match=r"plan of cache.planned is for 8 network evaluations a picture and here are 6"),
    ):
        NAMED["sd3"].call(pipe)


@pytest.mark.parametrize("compute", [(1, 2), (0, 2, 2), (0, 3, 1), (0, 6)])
def test_plans_rise_from_0_and_end_before_the_last(compute: tuple[int, ...]) -> None:
    with pytest.raises(RecipeError, match=r"compute rises from 0 and ends below steps \(6\)"):
        planned(*compute)
