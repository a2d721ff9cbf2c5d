"""Every solver in every real pipeline: the same sample as the standalone driver, the calls it claims, edits
honoured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from families import FAMILIES, Family
from hasten import Recipe, tree
from hasten.bridge.process import process
from hasten.bridge.scheduler import SolverScheduler
from hasten.denoiser import Prediction
from hasten.grid import build
from hasten.solvers.drive import solve, visited

SOLVERS = sorted(tree.functions("solvers"))
STEPS = 5


def both(f: Family) -> Any:
    return pytest.param(f, id=f.name)


@pytest.fixture(params=[both(f) for f in FAMILIES])
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.mark.system("flow-matching", "ddim", "unipc", "dpm-solver-pp", "cfg", "sd3")
@pytest.mark.parametrize("name", SOLVERS)
def test_pipeline_equals_standalone_solve(family: Family, name: str) -> None:
    pipe, solver = family.build(), tree.function("solvers", name)
    x = torch.randn(family.shape, generator=torch.Generator().manual_seed(3))
    known = process(pipe.scheduler)
    grid = build(known.path, tree.function("grids", "shifted"), STEPS, shift=2.0)
    network = family.network(pipe, family.inputs())

    def denoise(x: torch.Tensor, node: Any) -> Prediction:
        return Prediction.of(known.target, network(x, known.timestep(node.t)), x, node)

    with torch.no_grad():
        want = solve(solver, denoise, x, grid)
    recipe = Recipe.from_dict({"solver": name, "grid": {"shifted": {"shift": 2.0}}, "steps": STEPS})
    handle = hasten.accelerate(pipe, recipe)
    inputs = {k: v for k, v in family.inputs().items() if k != "num_inference_steps"}
    got = _run(pipe, inputs, x)
    assert handle.clock is not None
    assert handle.clock.calls == family.calls * len(visited(solver, grid))
    scale = want.abs().max()
    assert (got - want).abs().max() <= 1e-4 * scale.clamp_min(1)
    times = pipe.scheduler.timesteps
    assert times.dtype == torch.float32 and not torch.equal(times, times.round())
    handle.remove()


def _run(pipe: Any, inputs: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    out = pipe(**inputs, latents=x.clone(), output_type="latent")
    return out.frames if hasattr(out, "frames") else out.images


def test_keeps_the_pipelines_own_times_where_no_grid_is_given(family: Family) -> None:
    """ddim on the pipeline's own grid is what diffusers' own first-order sampler does, where that is its scheduler."""
    pipe = family.build()
    plain = family.call(pipe)
    with hasten.accelerate(pipe, Recipe(solver="ddim")):
        fast = family.call(pipe)
    if type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        assert (fast - plain).abs().max() < 1e-5 * plain.abs().max().clamp_min(1)
    assert torch.equal(family.call(pipe), plain)


@pytest.mark.parametrize("name", SOLVERS)
def test_edits_of_latents_between_steps_are_honoured(name: str) -> None:
    """Overwriting half of the latents by known ones at every step, as inpainting does: the standalone loop with the
    same edits gives the same sample."""
    family = next(f for f in FAMILIES if f.name == "sd3")
    pipe, solver = family.build(), tree.function("solvers", name)
    known, keep = process(pipe.scheduler), torch.full((1, 4, 16, 8), 0.25)
    grid = build(known.path, tree.function("grids", "uniform"), STEPS)
    network = family.network(pipe, family.inputs())
    x = torch.randn(family.shape, generator=torch.Generator().manual_seed(3))

    def edited(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([keep, x[..., 8:]], -1)

    with torch.no_grad():
        steps, first = solver(x, grid), True
        state, node = next(steps)
        while True:
            state = state if first else edited(state)
            first = False
            try:
                state, node = steps.send(Prediction.of("flow", network(state, known.timestep(node.t)), state, node))
            except StopIteration as end:
                want = edited(end.value)
                break

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": edited(tensors["latents"])}

    with hasten.accelerate(pipe, Recipe.from_dict({"solver": name, "grid": "uniform", "steps": STEPS})):
        inputs = {k: v for k, v in family.inputs().items() if k != "num_inference_steps"}
        got = pipe(**inputs, latents=x.clone(), output_type="latent", callback_on_step_end=callback).images
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_image_to_image_starts_at_its_strength(name: str, strength: float) -> None:
    from diffusers import StableDiffusion3Img2ImgPipeline

    family = next(f for f in FAMILIES if f.name == "sd3")
    pipe = StableDiffusion3Img2ImgPipeline(**family.build().components)
    pipe.set_progress_bar_config(disable=True)
    inputs = {k: v for k, v in family.inputs().items() if k not in ("num_inference_steps", "height", "width")}
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    solver = tree.function("solvers", name)
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": name, "grid": "uniform", "steps": 5})) as handle:
        rng = torch.Generator().manual_seed(0)
        pipe(**inputs, image=picture, strength=strength, output_type="latent", generator=rng)
        steps = int(5 * strength)
        assert handle.clock is not None and handle.clock.calls == solver.calls * steps - (solver.calls - 1)


def test_image_to_image_noises_to_the_first_node() -> None:
    pipe = FAMILIES[2].build()
    scheduler = SolverScheduler(pipe.scheduler, tree.function("solvers", "ddim"))
    scheduler.set_timesteps(4)
    x, eps = torch.full((2, 3), 2.0), torch.full((2, 3), -1.0)
    t = scheduler.timesteps[1].expand(2)
    node = scheduler.grid.nodes[1]  # type: ignore[union-attr]
    assert torch.allclose(scheduler.scale_noise(x, t, eps), node.alpha * x + node.sigma * eps, atol=1e-6)
    assert torch.equal(scheduler.add_noise(x, eps, t), scheduler.scale_noise(x, t, eps))


def test_a_newer_handles_solver_stands_in_for_an_older_ones_until_it_is_removed() -> None:
    family = FAMILIES[2]
    pipe, call = family.build(), family.call
    older, newer = ({"solver": s, "grid": "uniform", "steps": 6} for s in ("euler", "dpmpp_2m"))
    with hasten.accelerate(pipe, Recipe.from_dict(newer)):
        alone = call(pipe)
    with hasten.accelerate(pipe, Recipe.from_dict(older)):
        first = call(pipe)
        assert not torch.equal(first, alone)
        with hasten.accelerate(pipe, Recipe.from_dict(newer)):
            assert torch.equal(call(pipe), alone)
        assert torch.equal(call(pipe), first)


def test_user_arguments_win_over_the_recipe() -> None:
    family = FAMILIES[2]
    pipe = family.build()
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "ddim", "steps": 3})) as handle:
        family.call(pipe)  # asks for 6 steps
        assert handle.clock is not None and handle.clock.calls == 6
