"""Every solver in real pipelines: the same sample as the standalone driver, the calls it claims, edits honoured."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler

import hasten
from families import FAMILIES, Family, _unet, ask
from hasten import Recipe, tree
from hasten.bridge.pipelines import networks
from hasten.bridge.process import process
from hasten.bridge.scheduler import SolverScheduler
from hasten.brownian import Brownian, Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, build
from hasten.paths.flow import Flow
from hasten.paths.gvp import GVP
from hasten.recipe import RecipeError
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve, visited
from pipelines import PIPELINES

SOLVERS = tree.functions("solvers")
FIT = sorted(n for n, s in SOLVERS.items() if not s.unfit and not s.fitted)
STEPS = 5
NAMED = {f.name: f for f in PIPELINES}
ALL_IN = ("sd", "sd3", "stable_audio")  # of a table, a flow, an angle
SOME = ("heun", "dpmpp_2m", "sde_dpmpp_2m")  # two calls, several steps, noise
CASES = [(f, s) for f in NAMED for s in (FIT if f in ALL_IN else SOME)]
SD3 = FAMILIES[2]


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> Noise:
    """The same numbers for a pipeline and a standalone run, whatever a pipeline drew before."""

    def numbers() -> Any:
        rng = torch.Generator().manual_seed(5)
        return lambda shape, **_: torch.randn(shape, generator=rng)

    monkeypatch.setattr("hasten.bridge.scheduler.randn_tensor", numbers())
    draw = numbers()
    return lambda start, stop, like: draw(like.shape)


def start(family: Family) -> torch.Tensor:
    return torch.randn(family.shape, generator=torch.Generator().manual_seed(3))


def plain(family: Family) -> dict[str, Any]:
    return {k: v for k, v in family.inputs().items() if k != "num_inference_steps"}


@pytest.mark.system("flow-matching", "ddim", "unipc", "dpm-solver-pp", "cfg", "sd3")
@pytest.mark.parametrize(("where", "name"), CASES)
def test_pipeline_equals_standalone_solve(where: str, name: str, noise: Noise) -> None:
    family, solver = NAMED[where], SOLVERS[name]
    pipe, x = family.build(), start(family)
    known = process(pipe.scheduler)
    grid = build(known.path, tree.function("grids", "shifted"), STEPS, shift=2.0)
    network = family.network(pipe, family.inputs())

    def denoise(x: torch.Tensor, node: Node) -> Prediction:
        return known.read(network(x, known.timestep(node.t)), x, node)

    recipe = Recipe.from_dict({"solver": name, "grid": {"shifted": {"shift": 2.0}}, "steps": STEPS})
    with hasten.accelerate(pipe, recipe) as handle:
        got = family.ask(pipe, **plain(family), latents=x.clone())
        assert handle.clock is not None
        assert handle.clock.calls == family.calls * len(visited(solver, grid))
        times, first = pipe.scheduler.timesteps, pipe.scheduler.init_noise_sigma
    with torch.no_grad():
        want = known.unit * solve(solver, denoise, x * first, grid, noise)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max().clamp_min(1)
    assert times.dtype == torch.float32
    assert not torch.equal(times, times.round())


OWN: dict[str, tuple[Any, int]] = {
    "wan": ("unipc", 8), "wan22": ("unipc", 8), "sana": ("dpmpp_2m", 8), "stable_audio": ("sde_dpmpp_2m", 6),
    "hunyuandit": ("ddpm", 6), "ddpm": ({"ddpm": {"variance": "learned"}}, 6),
    "cogvideox": ("ddim", 5),  # a count that divides 1000: of others diffusers takes steps to times it does not visit
}  # fmt: skip


def floored(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return args, kwargs | {"timestep": kwargs["timestep"].floor()}


@pytest.mark.parametrize("where", NAMED)
def test_with_no_grid_the_pipelines_own_sample_comes_out(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So target, path, times, scale and clock were read right, end to end, and noise comes from the same generator
    (Stable Audio's own is made to). UniPC and DPM++ tell their networks of a flow whole steps, and so does this test.
    """
    family = NAMED[where]
    solver, steps = OWN.get(where, ("ddim", 6))
    pipe = family.build()
    rng = torch.Generator()
    given = family.inputs() | {"num_inference_steps": steps, "latents": start(family), "generator": rng}
    if where in ("wan", "wan22", "sana"):
        for net in networks(pipe).values():
            net.register_forward_pre_hook(floored, with_kwargs=True)
    elif where == "stable_audio":
        own = type(pipe.scheduler).step.__globals__
        sampler = lambda like, **_: lambda *_: torch.randn(like.shape, generator=rng)  # noqa: E731
        monkeypatch.setitem(own, "BrownianTreeNoiseSampler", sampler)
    rng.manual_seed(0)
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": solver})):
        ours = family.ask(pipe, **given)
    rng.manual_seed(0)
    theirs = family.ask(pipe, **given)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_latent_consistency_pipelines_own_sample_comes_out() -> None:
    """It lays its times by a setting of its own, and takes two things from a step."""
    sd = NAMED["sd"].build()
    base = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    parts = sd.components | {"unet": _unet(time_cond_proj_dim=8), "scheduler": base}
    parts.pop("image_encoder")
    pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = {k: v for k, v in NAMED["sd"].inputs().items() if not k.startswith("negative")}
    given |= {"num_inference_steps": 4, "original_inference_steps": 40}
    theirs = ask(pipe, **given, generator=torch.Generator().manual_seed(0))
    with hasten.accelerate(pipe, Recipe(solver="lcm")):
        ours = ask(pipe, **given, generator=torch.Generator().manual_seed(0))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_each_of_two_networks_is_asked_in_its_own_times() -> None:
    family = NAMED["wan22"]
    pipe = family.build()
    asked: dict[str, list[float]] = {"transformer": [], "transformer_2": []}
    for name, seen in asked.items():
        getattr(pipe, name).register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
        )
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "dpmpp_2m", "grid": "uniform", "steps": 16})):
        family.ask(pipe, **plain(family))
    assert [*asked["transformer"][::2], *asked["transformer_2"][::2]] == [1000 - 62.5 * i for i in range(16)]
    assert asked["transformer"][-1] == 875.0


@pytest.mark.parametrize("name", ["sd3", "sd", "svd"])
def test_a_users_generator_decides_the_noise(name: str) -> None:
    """Twice the same, otherwise with another; and of a list each sample has its own, whatever its neighbours."""
    family = NAMED[name]
    pipe = family.build()

    def draw(seeds: int | list[int], **more: Any) -> torch.Tensor:
        rngs = [torch.Generator().manual_seed(s) for s in ([seeds] if isinstance(seeds, int) else seeds)]
        return family.ask(pipe, **plain(family) | more, generator=rngs[0] if isinstance(seeds, int) else rngs)

    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "sde_dpmpp_2m", "grid": "uniform", "steps": 4})):
        one = draw(1)
        assert torch.equal(one, draw(1))
        assert not torch.allclose(one, draw(2), atol=0.1)
        if name != "svd":
            twice = {k: torch.cat([v, v]) for k, v in plain(family).items() if isinstance(v, torch.Tensor)}
            pair, alone = draw([1, 2], **twice), torch.cat([draw([1]), draw([2])])
            assert (pair - alone).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize("name", ["sd3", "svd"])
@pytest.mark.parametrize("solver", ["euler_maruyama", "sde_dpmpp_2m"])
def test_noise_can_be_one_path_for_every_number_of_steps(name: str, solver: str) -> None:
    """Ten steps and forty then end in nearly the same sample; it is what the standalone solver makes of a `Brownian`
    of the same generator; and the next picture of that generator is another."""
    family = NAMED[name]
    pipe, x = family.build(), start(family)

    def draw(steps: int, kind: str, *rngs: torch.Generator) -> list[torch.Tensor]:
        recipe = {"solver": solver, "grid": "uniform", "steps": steps, "noise": kind}
        with hasten.accelerate(pipe, Recipe.from_dict(recipe)):
            return [family.ask(pipe, **plain(family), latents=x.clone(), generator=rng) for rng in rngs]

    def alike(kind: str) -> float:
        ends = [draw(steps, kind, torch.Generator().manual_seed(1))[0].flatten() for steps in (10, 40)]
        return float(torch.corrcoef(torch.stack(ends))[0, 1])

    assert alike("path") > 0.9 > 0.7 > alike("fresh")
    rng = torch.Generator().manual_seed(1)
    one, two = draw(10, "path", rng, rng)
    assert not torch.allclose(one, two, atol=0.1)
    if name == "sd3":
        known, network = process(pipe.scheduler), family.network(pipe, family.inputs())
        grid = build(known.path, tree.function("grids", "uniform"), 10)
        noise = Brownian.of(torch.Generator().manual_seed(1))
        with torch.no_grad():
            want = solve(
                SOLVERS[solver], lambda x, n: known.read(network(x, known.timestep(n.t)), x, n), x, grid, noise
            )
        assert (one - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", [n for n in FIT if SOLVERS[n].stochastic])
def test_noise_is_asked_for_over_spans_that_do_not_overlap(name: str) -> None:
    """So independent numbers are increments of one Brownian motion, and none need be kept."""
    spans: list[list[float]] = []

    def note(begin: float, end: float, like: torch.Tensor) -> torch.Tensor:
        spans.append(sorted((begin, end)))
        return like

    for path in (Flow(), GVP()):
        spans.clear()
        grid = build(path, tree.function("grids", "shifted"), 7, shift=2.0)
        solve(SOLVERS[name], lambda x, n: Prediction(x, x, x), torch.ones(1, 2), grid, note)
        assert spans or name == "edm"  # without churn
        assert all(a[1] <= b[0] * (1 + 1e-9) for a, b in pairwise(sorted(spans)))


@pytest.mark.parametrize("name", FIT)
def test_no_step_asks_the_device_for_a_number(name: str) -> None:
    """On a device that has none to give; the last step looks for NaN."""
    scheduler = SolverScheduler(SD3.build().scheduler, SOLVERS[name])
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    x = torch.ones(1, 2, 4, 4, device="meta")
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(0.5 * x, t.to("meta"), x, return_dict=False)[0]
    assert x.is_meta


def edit(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((1, 4, 16, 8), 0.25), x[..., 8:]], -1)


@pytest.mark.parametrize("name", FIT)
def test_edits_of_latents_between_steps_are_honoured(name: str, noise: Noise) -> None:
    """Overwriting half of the latents by known ones at every step, as inpainting does: the standalone loop with the
    same edits gives the same sample."""
    pipe, solver = SD3.build(), SOLVERS[name]
    known = process(pipe.scheduler)
    grid = build(known.path, tree.function("grids", "uniform"), STEPS)
    network = SD3.network(pipe, SD3.inputs())
    with torch.no_grad():
        steps, first = solver(start(SD3), grid, noise), True
        state, node = next(steps)
        while True:
            state, first = state if first else edit(state), False
            try:
                state, node = steps.send(Prediction.of("flow", network(state, known.timestep(node.t)), state, node))
            except StopIteration as end:
                want = edit(end.value)
                break

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": edit(tensors["latents"])}

    with hasten.accelerate(pipe, Recipe.from_dict({"solver": name, "grid": "uniform", "steps": STEPS})):
        got = SD3.ask(pipe, **plain(SD3), latents=start(SD3), callback_on_step_end=callback)
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("name", sorted(n for n, s in SOLVERS.items() if s.unfit))
def test_a_solver_that_no_pipeline_can_run_says_so_before_the_first_call(name: str) -> None:
    pipe = SD3.build()
    own = pipe.scheduler
    with pytest.raises(RecipeError, match="pipeline") as told:
        hasten.accelerate(pipe, Recipe(solver=name, steps=4))
    assert "\n" not in str(told.value)
    assert pipe.scheduler is own
    with pytest.raises(ValueError, match="take another solver here"):
        SolverScheduler(own, SOLVERS[name])


def test_what_no_solver_does_is_refused() -> None:
    scheduler = SolverScheduler(SD3.build().scheduler, SOLVERS["ddim"])
    x = torch.zeros(1, 4)
    with pytest.raises(RuntimeError, match="set_timesteps before step"):
        scheduler.step(x, 1000.0, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="per_token_timesteps: no solver"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=x)
    with pytest.raises(ValueError, match="NaN after the call at t = 1"):
        scheduler.step(x / 0, scheduler.timesteps[0], x)


def test_a_step_also_tells_the_clean_sample_that_was_seen() -> None:
    scheduler = SolverScheduler(SD3.build().scheduler, SOLVERS["dpmpp_2m"])
    scheduler.set_timesteps(4)
    x, v = torch.tensor([[0.3, -1.0]]), torch.tensor([[0.5, 0.25]])
    out = scheduler.step(v, scheduler.timesteps[0], x)
    assert torch.allclose(out.pred_original_sample, x - v * scheduler.sigmas[0], atol=1e-6)


def test_a_newer_handles_solver_stands_in_for_an_older_ones_until_it_is_removed() -> None:
    pipe, call = SD3.build(), SD3.call
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
    pipe = SD3.build()
    with hasten.accelerate(pipe, Recipe.from_dict({"solver": "ddim", "steps": 3})) as handle:
        SD3.call(pipe)  # asks for 6 steps
        assert handle.clock is not None
        assert handle.clock.calls == 6


def test_given_timesteps_are_told_as_they_are() -> None:
    """Whatever the scheduler's shift: one source of truth for what the network is told and what the solver does."""
    scheduler = SolverScheduler(SD3.build().scheduler, SOLVERS["dpmpp_2m"])
    scheduler.set_timesteps(timesteps=[1000, 700.5, 12])
    assert scheduler.timesteps.tolist() == [1000, 700.5, 12]
    assert isinstance(scheduler.grid, Grid)
    assert [n.t for n in scheduler.grid.nodes] == pytest.approx([1, 0.7005, 0.012, 0])
    assert isinstance(scheduler.solver, Solver)
