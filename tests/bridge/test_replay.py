"""A denoiser taken out of a pipeline says what the pipeline would have said; what can't be taken out is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import FAMILIES, Family, sd3_with_words
from hasten import Recipe, accelerate, tree
from hasten.bridge.replay import CannotReplay, frozen, replay
from hasten.denoiser import Prediction
from hasten.fit.fit import Effort
from hasten.fit.pipeline import fit_pipeline
from hasten.grid import build
from hasten.solvers.drive import solve


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_replay_says_what_the_networks_own_call_says(family: Family) -> None:
    """Against the closure of each family, which calls and guides by hand, at states and times never seen."""
    pipe = family.build()
    plain = family.call(pipe)
    seen = replay(pipe, **family.inputs(), generator=torch.Generator().manual_seed(0))
    network = family.network(pipe, family.inputs())
    x = torch.randn(family.shape, generator=torch.Generator().manual_seed(4))
    grid = build(seen.path, tree.function("grids", "shifted"), 4, shift=1.7)

    def by_hand(x: torch.Tensor, node: Any) -> Prediction:
        return Prediction.of(seen.process.target, network(x, seen.process.timestep(node.t)), x, node)

    with torch.no_grad():
        got, want = (solve(tree.function("solvers", "dpmpp_2m"), d, x, grid) for d in (seen.denoise, by_hand))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max().clamp_min(1)
    assert torch.equal(family.call(pipe), plain)  # nothing of the watching stayed


def test_a_replay_has_gradients_and_the_weights_ask_for_none() -> None:
    family = next(f for f in FAMILIES if f.name == "sd3")
    pipe = family.build()
    seen = replay(pipe, **family.inputs())
    with frozen(pipe):
        assert not any(p.requires_grad for p in pipe.transformer.parameters())
        x = seen.x.clone().requires_grad_()
        seen.denoise(x, build(seen.path, tree.function("grids", "uniform"), 2).nodes[1]).x0.sum().backward()
        t = torch.full((1,), 0.4, requires_grad=True)
        seen.denoise.network(seen.x, t).sum().backward()
        with torch.no_grad():
            up, down = (float(seen.denoise.network(seen.x, torch.full((1,), v)).sum()) for v in (0.4001, 0.3999))
        assert t.grad is not None and float(t.grad) == pytest.approx((up - down) / 0.0002, rel=0.1)
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.requires_grad and p.grad is None for p in pipe.transformer.parameters())


def test_a_pipeline_that_does_more_between_its_steps_is_refused() -> None:
    family = next(f for f in FAMILIES if f.name == "sd3")
    pipe = family.build()

    def shrink(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.5
        return tensors

    with pytest.raises(CannotReplay, match="does more between two steps"):
        replay(pipe, **family.inputs(), callback_on_step_end=shrink)
    assert torch.equal(family.call(pipe), family.call(family.build()))


def test_a_pipeline_is_fitted_and_the_recipe_draws_with_as_many_calls() -> None:
    pipe = sd3_with_words()
    prompts = [f"prompt number {i} of a thing" for i in range(6)]
    plain = pipe(
        prompts[0], generator=torch.Generator().manual_seed(0), output_type="latent", height=32, width=32
    ).images
    found = fit_pipeline(pipe, prompts, 3, effort=Effort(8, 4), height=32, width=32)
    again = pipe(
        prompts[0], generator=torch.Generator().manual_seed(0), output_type="latent", height=32, width=32
    ).images
    assert torch.equal(again, plain)
    recipe = Recipe.from_dict(found.recipe.to_dict())
    assert recipe == found.recipe
    with accelerate(pipe, recipe) as handle:
        pipe(prompts[0], output_type="latent", height=32, width=32)
        assert handle.clock is not None and handle.clock.calls == 3
    with accelerate(pipe, recipe), pytest.raises(ValueError, match="has 3 steps; 5 were asked for"):
        pipe(prompts[0], num_inference_steps=5, output_type="latent", height=32, width=32)
