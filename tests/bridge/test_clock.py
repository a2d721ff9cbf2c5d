"""Every forward of every pipeline's network is told which moment it is, without a list of pipelines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hasten
from families_more import MORE
from hasten import Recipe, moment
from hasten.bridge.drawing import draw, twin
from hasten.bridge.pipelines import networks
from hasten.moment import Moment
from pipelines import PIPELINES

NAMED = {f.name: f for f in PIPELINES}
UNGUIDED = {"guidance_scale": 1.0, "guidance_scale_2": 1.0, "true_cfg_scale": 1.0, "max_guidance_scale": 1.0}


def watched(pipe: Any) -> list[Moment]:
    """The moment of each forward from now on."""
    seen: list[Moment] = []
    for net in networks(pipe).values():

        def forward(*args: Any, inner: Any = net.forward, **kwargs: Any) -> Any:
            seen.append(moment.now())
            return inner(*args, **kwargs)

        net.forward = forward
    return seen


@pytest.mark.parametrize("where", NAMED)
def test_branches_and_times_follow_from_counting(where: str) -> None:
    family = NAMED[where]
    pipe = family.build()
    seen = watched(pipe)
    guidance = {k: 1.0 for k in UNGUIDED if k in family.inputs()}
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "heun", "grid": "uniform", "steps": 3})):
        family.ask(pipe, **family.inputs() | {"num_inference_steps": 3})
        times = pipe.scheduler.timesteps.tolist()
        nodes = [pipe.scheduler.process.t(t) for t in times]
        guided = seen.copy()
        seen.clear()
        family.ask(pipe, **family.inputs() | {"num_inference_steps": 3} | guidance)
    once = ["cond", "uncond"] if family.calls == 2 else ["both" if guidance else "cond"]
    assert [m.branch for m in guided] == once * 5
    assert [m.branch for m in seen] == ["cond"] * 5
    for told in (guided, seen):
        calls = range(len(told) // 5)
        assert [(m.step, m.steps) for m in told] == [(i, 5) for i in range(5) for _ in calls]
        assert [m.t for m in told] == pytest.approx([t for t in nodes for _ in calls], abs=1e-6)
    assert guided[0].run != seen[0].run


def test_a_network_that_counts_in_other_units_starts_at_the_start() -> None:
    """Sana's may be told thousandths; its pipeline says nothing of where it starts."""
    pipe = NAMED["sana"].build()
    pipe.transformer.register_to_config(timestep_scale=0.001)
    seen = watched(pipe)
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "ddim", "grid": "uniform", "steps": 4})):
        NAMED["sana"].ask(pipe, **NAMED["sana"].inputs() | {"num_inference_steps": 4})
    assert [m.t for m in seen] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("where", NAMED)
def test_a_twin_draws_the_same_and_shares_no_network(where: str) -> None:
    family = NAMED[where]
    pipe, given = family.build(), family.inputs() | {"num_inference_steps": 2}
    other = twin(pipe)
    rng = torch.Generator()
    one, two = (family.ask(p, **given, generator=rng.manual_seed(2)) for p in (pipe, other))
    assert torch.equal(one, two)
    shared = {id(p) for net in networks(pipe).values() for p in net.parameters()}
    assert not shared & {id(p) for net in networks(other).values() for p in net.parameters()}
    assert other.config == pipe.config


def test_pictures_come_from_pipelines_without_prompts_too() -> None:
    pipe = NAMED["ddpm"].build()
    pair = list(draw(pipe, ["", "", ""], [1, 2, 3], batch=2, num_inference_steps=2))
    assert [tuple(p.shape) for p in pair] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    frames = next(draw(NAMED["svd"].build(), [""], [1], **NAMED["svd"].inputs()))
    assert tuple(frames.shape) == (1, 3, 8, 8)


def test_what_gives_no_pictures_is_told() -> None:
    class Sound:
        def __call__(self, prompt: list[str], **_: Any) -> Any:
            return SimpleNamespace(audios=torch.zeros(len(prompt), 2, 8))

    with pytest.raises(ValueError, match="Sound gives no pictures"):
        next(draw(Sound(), ["a"], [1]))


def test_a_pipeline_that_puts_its_conditional_half_first_is_turned() -> None:
    """DiT's: without guidance anywhere, its batch of both gives what its conditional branch alone gives."""
    family = next(f for f in MORE if f.name == "dit")
    pipe = family.build()
    guided, alone = family.call(pipe), family.call(pipe, guidance_scale=1.0)
    with hasten.accelerate(pipe, Recipe.from_dict({"guidance": {"interval": [0.0, 0.0]}})):
        got = family.call(pipe)
    assert (got - alone).abs().max() < 1e-5
    assert (guided - alone).abs().max() > 1e-3
    with hasten.accelerate(pipe, Recipe.from_dict({})):
        assert torch.equal(family.call(pipe), guided)
