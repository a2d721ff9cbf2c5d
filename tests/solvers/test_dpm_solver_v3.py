"""DPM-Solver-v3: its statistics are the model's, and with them it is exact, of its order, and nearer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from exact import distance, flown, slope, spaced
from hasten import Recipe
from hasten.denoiser import denoiser
from hasten.grid import Grid, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.recipe import RecipeError
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.dpm_solver_v3 import dpm_solver_v3, statistics
from hasten.solvers.drive import solve
from hasten.solvers.exponential import weights
from hasten.solvers.unipc import unipc

LAW = Mixture()
X = torch.linspace(-2, 2, 9, dtype=torch.float64)
PATHS = [Flow(), EDM(5.0), Preserving()]
REACH = (-1.55, 2.05)


def named(path: Any) -> str:
    return type(path).__name__


def network(law: Gaussian | Mixture, path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """eps of rows [B], differentiable by t as well."""
    kinds = ((law.mean,), (1.0,)) if isinstance(law, Gaussian) else (law.means, law.weights)
    means, shares = (torch.tensor(v, dtype=torch.float64) for v in kinds)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        spread = law.var * alpha**2 + sigma**2
        off = x[:, None] - alpha * means
        return (torch.softmax(shares.log() - off**2 / (2 * spread), -1) * off * sigma / spread).sum(-1)

    return eps


@cache
def measured(path: Path, law: Gaussian | Mixture = LAW, points: int = 25) -> Any:
    rng = torch.Generator().manual_seed(0)
    gaussian = isinstance(law, Gaussian)
    x0 = law.mean + law.var**0.5 * torch.randn(100, generator=rng) if gaussian else law.sample(4000, rng)
    return statistics(denoiser(network(law, path), "eps"), x0.double(), path, REACH, rng, points)


def off(solver: Any, grid: Grid) -> float:
    return distance(solve(solver, LAW.denoise, X, grid), flown(LAW, X, grid.nodes[0], grid.nodes[-1]))


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_on_a_gaussian_l_is_known_and_one_step_is_exact(path: Path) -> None:
    """eps is linear in x, so f is one number, f' = b, and nothing is left to guess."""
    law = Gaussian()
    rows = measured(path, law, 49)
    for lam, linear, s, _ in rows:
        n = at(path, [float(path.time(torch.tensor(lam, dtype=torch.float64))), 0.0]).nodes[0]
        assert linear == pytest.approx(n.sigma**2 / (law.var * n.alpha**2 + n.sigma**2), abs=1e-12)
        assert s == 0
    grid = spaced(path, 1, "lam", -1.5, 2)
    got = solve(dpm_solver_v3.given(statistics=rows, order=1), law.denoise, X, grid)
    assert (got - law.flow(X, *grid.nodes)).abs().max() < 1e-8


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_s_and_b_are_the_line_of_what_f_does_along_the_flow(path: Path) -> None:
    """Against differences of f between states that the exact flow connects."""
    lam, linear, s, b = measured(path)[12]
    lams = torch.tensor([lam - 1e-3, lam, lam + 1e-3], dtype=torch.float64)
    before, now, after = at(path, path.time(lams).tolist()).nodes
    falling = (measured(path)[13][1] - measured(path)[11][1]) / (measured(path)[13][0] - measured(path)[11][0])
    rng = torch.Generator().manual_seed(1)
    x = now.alpha * LAW.sample(4000, rng).double() + now.sigma * torch.randn(4000, generator=rng).double()

    def f(n: Any, linear: float) -> Tensor:
        state = flown(LAW, x, now, n)
        return (n.sigma * LAW.denoise(state, n).eps - linear * state) / n.alpha

    change = (f(after, linear + 1e-3 * falling) - f(before, linear - 1e-3 * falling)) / 2e-3
    table = torch.stack([f(now, linear), torch.ones_like(x)], 1)
    line = torch.linalg.lstsq(table, change[:, None]).solution.flatten().tolist()
    assert line == pytest.approx([s, b], abs=0.08)


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("path", PATHS, ids=named)
def test_order(path: Path, order: int, corrector: bool) -> None:
    solver = dpm_solver_v3.given(statistics=measured(path), order=order, corrector=corrector)
    assert slope(lambda n: off(solver, spaced(path, n, "start"))) == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("steps", [8, 10, 15])
@pytest.mark.parametrize("path", PATHS, ids=named)
def test_is_nearer_than_unipc_of_the_same_order(path: Path, steps: int) -> None:
    grid = spaced(path, steps, "lam", -1.5, 2)
    assert off(dpm_solver_v3.given(statistics=measured(path)), grid) < 0.75 * off(unipc, grid)


@pytest.mark.parametrize(("linear", "scaling"), [(0.0, -1.0), (1.0, 0.0)])
def test_at_settled_statistics_it_is_its_forerunners(linear: float, scaling: float) -> None:
    """g is eps, or -x0; of first order both are DDIM."""
    rows = tuple((lam, linear, scaling, 0.0) for lam in (-2.0, 2.0))
    grid = spaced(Preserving(), 6, "start", -1.5, 2)
    first = dpm_solver_v3.given(statistics=rows, order=1, corrector=False)
    assert (solve(first, LAW.denoise, X, grid) - solve(ddim, LAW.denoise, X, grid)).abs().max() < 1e-12
    if linear:
        x, seen = X, []
        for now, after in grid.steps():
            seen = [(now, LAW.denoise(x, now).x0), *seen[:2]]
            shares = weights(now, after, [n for n, _ in seen])
            x = after.sigma / now.sigma * x + sum(w * x0 for w, (_, x0) in zip(shares, seen, strict=True))
        third = dpm_solver_v3.given(statistics=rows, order=3, corrector=False)
        assert (solve(third, LAW.denoise, X, grid) - x).abs().max() < 1e-12


def test_runs_from_pure_noise_to_clean_and_converges() -> None:
    """The ends themselves are DDIM's; the statistics need reach no farther than what lies between."""
    rows, noise = measured(Flow()), torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (5, 10, 20, 40):
        inner = spaced(Flow(), steps, "lam", *REACH).nodes
        grid = at(Flow(), [1.0, *(n.t for n in inner), 0.0])
        got = solve(dpm_solver_v3.given(statistics=rows), LAW.denoise, noise, grid)
        ends = [at(Flow(), times) for times in ([1.0, inner[0].t], [inner[-1].t, 0.0])]
        start = solve(ddim, LAW.denoise, noise, ends[0])
        want = solve(ddim, LAW.denoise, flown(LAW, start, inner[0], inner[-1]), ends[1])
        errors.append(distance(got, want))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 27 * errors[3]


def test_what_is_missing_is_said() -> None:
    grid = spaced(Flow(), 3, "lam", -1.5, 2)
    with pytest.raises(ValueError, match="no statistics of the model: measure them"):
        solve(dpm_solver_v3, LAW.denoise, X, grid)
    with pytest.raises(ValueError, match=r"reach from lam -1.550 to 2.050 and the grid from -1.500 to 3.000"):
        solve(dpm_solver_v3.given(statistics=measured(Flow())), LAW.denoise, X, spaced(Flow(), 3, "lam", -1.5, 3))
    with pytest.raises(ValueError, match="statistics need derivatives"):
        statistics(LAW.denoise, X, Flow(), REACH, torch.Generator())


def test_statistics_stand_in_a_recipe() -> None:
    rows = measured(Flow())
    data = {"hasten": 1, "solver": {"dpm_solver_v3": {"statistics": [list(r) for r in rows], "order": 3}}, "steps": 6}
    recipe = Recipe.from_dict(data)
    assert recipe.solving().settings == {"statistics": rows, "order": 3}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    data["solver"] = {"dpm_solver_v3": {"statistics": [[0.0, 1.0]]}}
    with pytest.raises(RecipeError, match="statistics"):
        Recipe.from_dict(data)
