"""Every solver has the order it declares, at every variant of its settings, on every path, on a linear and a bent law.

Solvers are found in the file tree: all that are deterministic, claim an order, ask at points and follow the grid that
they are given. Their variants are all combinations of the settings that are few (bool, Literal, int in a short range),
the others at their default. The slope is taken on a grid even in lam, unless the solver's file names at its top level
another spacing in which it claims its order: `even = "t"`, "sigma" (of sigma / alpha), or "start" (lam with small first
steps, for multistep methods that start themselves with lower orders than their own).
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from torch import Tensor

from exact import distance, flown, slope, spaced
from hasten import tree
from hasten.denoiser import Prediction
from hasten.grid import Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve
from hasten.tune.space import bounds

SOLVERS = {
    name: s
    for name, s in tree.functions("solvers").items()
    if not (s.stochastic or s.adaptive or s.few or s.fitted) and s.asks == "points"
}
PATHS = [Flow(), EDM(5.0), Preserving()]
X = torch.linspace(-2, 2.5, 24, dtype=torch.float64)
# of one deviation only, all errors on a Gaussian would vanish together where theirs happens to change its sign
LAWS = [Gaussian(var=torch.linspace(0.05, 1.2, 24, dtype=torch.float64) ** 2), Mixture()]  # type: ignore[arg-type]
FEWEST = 8


def variants(solver: Solver) -> list[Solver]:
    few: dict[str, list[Any]] = {}
    for name, (kind, _, field) in tree.settings(solver).items():
        low, high, _ = bounds(field)
        if kind is bool:
            few[name] = [False, True]
        elif get_origin(kind) is Literal:
            few[name] = list(get_args(kind))
        elif kind is int and low is not None and high is not None and high - low < FEWEST:
            few[name] = list(range(int(low), int(high) + 1))
    return [solver.given(**dict(zip(few, chosen, strict=True))) for chosen in product(*few.values())]


def told(value: Any) -> str:
    if isinstance(value, Solver):
        return "-".join([value.name, *(f"{k}={v}" for k, v in value.settings.items())])
    return type(value).__name__


VARIANTS = [v for s in SOLVERS.values() for v in variants(s)]


@pytest.mark.system("ddim", "unipc", "dpm-solver", "dpm-solver-pp", "flow-matching", "rectified-flow")
@pytest.mark.parametrize("law", LAWS, ids=told)
@pytest.mark.parametrize("path", PATHS, ids=told)
@pytest.mark.parametrize("solver", VARIANTS, ids=told)
def test_order(solver: Solver, path: Path, law: Gaussian | Mixture) -> None:
    even = solver.run.__globals__.get("even", "lam")

    def error(steps: int) -> float:
        grid = spaced(path, steps, even)
        return distance(solve(solver, law.denoise, X, grid), flown(law, X, grid.nodes[0], grid.nodes[-1]))

    found = slope(error)
    assert found > solver.order - 0.15
    if isinstance(law, Mixture):  # on a linear law a method may have no leading error, as the midpoint's in t has none
        assert found < solver.order + 0.15


@pytest.mark.parametrize("path", PATHS, ids=told)
def test_the_truth_is_the_flow(path: Path) -> None:
    """Richardson: two Heun solutions cancel the h^2 term, and what is left is far below it."""
    law, grids = Mixture(), [spaced(path, n, "lam") for n in (400, 800)]
    coarse, fine = (solve(SOLVERS["heun"], law.denoise, X, g) for g in grids)
    want = flown(law, X, grids[0].nodes[0], grids[0].nodes[-1])
    assert (fine + (fine - coarse) / 3 - want).abs().max() < 1e-9


def test_variants_are_all_choices_of_few() -> None:
    settings = [v.settings for v in variants(SOLVERS["unipc"])]
    assert len(settings) == 5 * 2 * 2
    assert {s["order"] for s in settings} == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("path", [Flow(), Preserving()], ids=told)
@pytest.mark.parametrize("solver", VARIANTS, ids=told)
def test_runs_from_pure_noise_to_clean_and_converges(solver: Solver, path: Path) -> None:
    """From alpha = 0 (or the path's end) to sigma = 0: no infinity, and the exact flow's answer."""
    law = Gaussian()
    errors = []
    for steps in (10, 80):  # at 20 errors of UniPC change their sign
        grid = at(path, [1 - i / steps for i in range(steps + 1)])
        got = solve(solver, law.denoise, X, grid)
        errors.append(float((got - law.flow(X, grid.nodes[0], grid.nodes[-1])).abs().max()))
    assert errors[1] < errors[0]
    assert errors[1] < 0.05


@pytest.mark.parametrize("solver", [s for s in SOLVERS.values() if "order" in tree.settings(s)], ids=told)
def test_an_order_above_the_number_of_steps_is_refused_where_it_was_set(solver: Solver) -> None:
    """What a step asks for counts; the default takes fewer steps as they are."""
    law, most = Gaussian(), max(v.settings["order"] for v in variants(solver))
    asked = solver.given(order=most)
    enough = -(-most // asked.calls)
    for steps in range(1, most + 1):
        grid = spaced(Flow(), steps, "lam")
        solve(solver, law.denoise, X, grid)
        if steps >= enough:
            solve(asked, law.denoise, X, grid)
        else:
            with pytest.raises(
                ValueError, match=f"{solver.name} of order {most} can't be had in so few steps, {steps}: take more"
            ):
                solve(asked, law.denoise, X, grid)


@pytest.mark.system("ddim")
def test_ddim_is_exact_where_the_prediction_does_not_change() -> None:
    """One data point: x0 and eps are constant along the flow, so one step is the whole flow."""
    for path in PATHS:
        grid = at(path, [0.9, 0.2])
        now, after = grid.nodes
        x0, eps = torch.tensor([0.3]), torch.tensor([-1.1])
        got = solve(
            SOLVERS["ddim"], lambda x, n, x0=x0, eps=eps: Prediction(x, x0, eps), now.alpha * x0 + now.sigma * eps, grid
        )
        assert torch.allclose(got, after.alpha * x0 + after.sigma * eps, atol=1e-6)


@pytest.mark.system("rectified-flow")
def test_euler_is_exact_on_a_straight_flow_in_one_step() -> None:
    """A deterministic straight coupling x1 -> x0 = 2 x1 + 1: the rectified flow is straight, one step lands on it."""

    def denoise(x: Tensor, n: Node) -> Prediction:
        eps = (x - (1 - n.t)) / (2 * (1 - n.t) + n.t)
        return Prediction(x, 2 * eps + 1, eps)

    x = torch.tensor([-1.0, 0.5, 3.0])
    got = solve(SOLVERS["euler"], denoise, x, at(Flow(), [1.0, 0.0]))
    assert torch.allclose(got, 2 * x + 1, atol=1e-6)


@pytest.mark.system("ddim")
def test_ddim_equals_diffusers_on_its_own_times() -> None:
    """A peer's result: diffusers' scheduler, stepped by hand on the same betas and integer times. Its last alpha_bar is
    1: the same clean end."""
    from diffusers import DDIMScheduler

    from hasten.bridge.process import process

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
    peer = DDIMScheduler(**betas, clip_sample=False)
    peer.set_timesteps(10)
    known = process(peer)
    law, x = Gaussian(), torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None, None, None]
    grid = at(known.path, [known.t(t) for t in peer.timesteps.tolist()] + [0.0])
    theirs = x.clone()
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        theirs = peer.step(law.denoise(theirs, node).eps, t, theirs).prev_sample
    assert (solve(SOLVERS["ddim"], law.denoise, x, grid) - theirs).abs().max() < 1e-5


@pytest.mark.system("unipc")
def test_unipc_reads_pure_noise_again() -> None:
    """On a mixture in 64 dimensions from t = 1, at every number of steps nearer to the exact end than where its history
    begins after the first step."""
    rng = torch.Generator().manual_seed(0)
    law, x = Cluster(), torch.randn(400, 64, generator=rng, dtype=torch.float64)
    exact = solve(SOLVERS["heun"], law, x, at(Flow(), [1 - i / 300 for i in range(301)]))
    for steps in (5, 6, 8, 10, 15, 20):
        times = [1 - i / steps for i in range(steps + 1)]
        middle = solve(SOLVERS["ddim"], law, x, at(Flow(), times[:2]))
        late = solve(SOLVERS["unipc"], law, middle, at(Flow(), times[1:]))
        whole = solve(SOLVERS["unipc"], law, x, at(Flow(), times))
        off, off_late = (float((y - exact).norm(dim=1).mean()) for y in (whole, late))
        assert off < 0.9 * off_late, (steps, off, off_late)


class Cluster:
    """Twenty narrow Gaussians in 64 dimensions on the straight path, as a denoiser."""

    def __init__(self) -> None:
        self.centres = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __call__(self, x: Tensor, n: Node) -> Prediction:
        spread = 0.05 * n.alpha**2 + n.sigma**2
        apart = torch.cdist(x, n.alpha * self.centres).square()
        mean = torch.softmax(-apart / (2 * spread), 1) @ self.centres
        x0 = mean + 0.05 * n.alpha / spread * (x - n.alpha * mean)
        return Prediction(x, x0, n.sigma / spread * (x - n.alpha * mean))
