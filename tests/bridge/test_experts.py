"""Wan 2.2: two networks that take turns at a boundary of the noise, under solvers, guidance and caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import hasten
from families_video import BOUNDARY
from hasten import Recipe, tree
from hasten.bridge.pipelines import networks
from hasten.bridge.process import process
from hasten.denoiser import Prediction
from hasten.grid import Node, build
from hasten.solvers.drive import solve
from pipelines import PIPELINES

pytestmark = pytest.mark.system("wan-2-2")
NAMED = {f.name: f for f in PIPELINES}
WAN, ONE = NAMED["wan22"], NAMED["wan"]
RECIPES: dict[str, Any] = {
    "nothing": {},
    "solver": {"solver": "dpmpp_2m", "steps": 6},
    "text": {"methods": ["cache.text"]},
    "guidance": {"methods": [{"guidance.rescale": {"phi": 0.7}}]},
    "attention": {"methods": [{"attention.exact": {"backend": "tiled"}}]},
}


def twins(second: Any) -> Any:
    """Wan with one network in both places, or a copy of it in the second."""
    parts = ONE.build().components
    pipe = WanPipeline(**parts | {"transformer_2": second(parts["transformer"])}, boundary_ratio=BOUNDARY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("second", [copy.deepcopy, lambda net: net], ids=["alike", "the same"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_that_are_alike_are_one_model(recipe: str, second: Any) -> None:
    one, two = ONE.build(), twins(second)
    laid = Recipe.from_dict(RECIPES[recipe])
    with hasten.accelerate(one, laid):
        want = ONE.call(one)
    before = ONE.call(two)
    with hasten.accelerate(two, laid):
        assert torch.equal(ONE.call(two, guidance_scale_2=3.0), want)
    assert torch.equal(ONE.call(two), before)


def test_a_cache_of_one_expert_is_not_read_by_the_other() -> None:
    """Each runs in full at its own first step, whatever step of the trajectory that is; then every third of them."""
    pipe = WAN.build()
    ran: list[tuple[str, int]] = []
    for name, net in networks(pipe).items():
        net.blocks[0].attn1.to_q.register_forward_hook(lambda *_, name=name: ran.append((name, len(asked))))
    asked: list[float] = []
    for net in networks(pipe).values():
        net.register_forward_pre_hook(lambda m, a, k: asked.append(float(k["timestep"][0])), with_kwargs=True)
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"cache.interval": {"every": 4}}]})):
        WAN.call(pipe, num_inference_steps=8)
    turns = [t >= BOUNDARY * 1000 for t in asked]
    switch = turns.index(False)
    assert 0 < switch < len(turns) - 1
    assert [name for name, i in ran if i == 1] == ["transformer"]
    assert [name for name, i in ran if i == switch + 1] == ["transformer_2"]
    assert {name for name, i in ran if i <= switch} == {"transformer"}
    assert {name for name, i in ran if i > switch} == {"transformer_2"}
    assert len(ran) < len(asked)


@pytest.mark.parametrize("solver", ["lcm", "consistency", "tcd"])
def test_students_of_few_steps_take_turns_too(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few-step sampler over both experts is the sampler over the network that switches at the boundary."""
    pipe, x = WAN.build(), torch.randn(WAN.shape, generator=torch.Generator().manual_seed(3))
    known, steps = process(pipe.scheduler), 4
    grid = build(known.path, tree.function("grids", "shifted"), steps, shift=5.0)
    network = WAN.network(pipe, WAN.inputs())
    times: list[float] = []

    def numbers() -> Any:
        rng = torch.Generator().manual_seed(5)
        return lambda shape, **_: torch.randn(shape, generator=rng)

    def denoise(x: torch.Tensor, node: Node) -> Prediction:
        times.append(known.timestep(node.t))
        return known.read(network(x, times[-1]), x, node)

    monkeypatch.setattr("hasten.bridge.scheduler.randn_tensor", numbers())
    recipe = Recipe.from_dict({"solver": solver, "grid": {"shifted": {"shift": 5.0}}, "steps": steps})
    given = {k: v for k, v in WAN.inputs().items() if k != "num_inference_steps"}
    with hasten.accelerate(pipe, recipe):
        got = WAN.ask(pipe, **given, latents=x.clone())
        first = pipe.scheduler.init_noise_sigma
    draw = numbers()
    with torch.no_grad():
        want = known.unit * solve(
            tree.function("solvers", solver), denoise, x * first, grid, lambda a, b, like: draw(like.shape)
        )
    assert {t >= BOUNDARY * 1000 for t in times} == {True, False}
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
