"""What is fitted is fitted right: against brute force, closed forms, and the exact flow of a mixture."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import exp

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.denoiser import denoiser
from hasten.fit.curvature import curvature
from hasten.fit.elbo import elbo
from hasten.fit.fit import Effort, calls, fit
from hasten.fit.learned import Rollout, learned
from hasten.fit.search import refined
from hasten.fit.shortest import shortest
from hasten.fit.subspace import subspace
from hasten.fit.trajectory import Trajectory, record
from hasten.grid import Grid, at, build
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve

CENTRES = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def mixture(x: Tensor, t: Tensor) -> Tensor:
    """The velocity on the straight path of five narrow Gaussians in 8 dimensions: x, [B, 8], t, [B]."""
    a, s = 1 - t[:, None], t[:, None]
    spread = 0.05 * a**2 + s**2
    off = x[:, None] - a[:, None] * CENTRES.to(x)
    part = torch.softmax(-off.square().sum(-1) / (2 * spread), -1)
    x0 = (part[..., None] * (CENTRES.to(x) + 0.05 * (a / spread)[:, None] * off)).sum(1)
    return (x - a * x0) / s - x0


MODEL = denoiser(mixture, "flow")


def noise(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(steps: int) -> Grid:
    return build(Flow(), tree.function("grids", "uniform"), steps)


def exact(size: int = 32, steps: int = 60) -> Trajectory:
    return record(tree.function("solvers", "heun"), MODEL, noise(size), uniform(steps))


def test_the_shortest_way_is_that_of_brute_force() -> None:
    cost = torch.rand(11, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in range(1, 11):
        ways = [(0, *inner, 10) for inner in combinations(range(1, 10), steps - 1)]
        best = min(ways, key=lambda way: sum(cost[i, j] for i, j in pairwise(way)))
        assert tuple(shortest(cost, steps)) == best
    for steps in (0, 11):
        with pytest.raises(ValueError, match="11 points allow 1 to 10 steps"):
            shortest(cost, steps)
    cost[2, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        shortest(cost, 3)


@pytest.mark.system("dp-timesteps")
def test_one_table_of_the_elbo_serves_every_budget_and_beats_fixed_strides() -> None:
    law, rng, points = Mixture(), torch.Generator().manual_seed(0), 120
    grid = at(Preserving(), [1 - i / points for i in range(points + 1)])
    asked: list[float] = []

    def told(x: Tensor, n: object) -> object:
        asked.append(n.t)  # type: ignore[attr-defined]
        return law.denoise(x, n)  # type: ignore[arg-type]

    table = elbo(told, law.sample(4000, rng).double(), grid, rng)  # type: ignore[arg-type]
    assert len(asked) == points
    for steps in (3, 5, 8, 15, 40):

        def cost(way: list[int]) -> float:
            return float(sum(table[i, j] for i, j in pairwise(way)))

        found = cost(shortest(table, steps))
        even = [round(points * i / steps) for i in range(steps + 1)]
        quadratic = [points - round(points * (i / steps) ** 2) for i in range(steps, -1, -1)]
        assert found < 0.99 * min(cost(even), cost(quadratic))
        if steps == 3:
            ways = [[0, *inner, points] for inner in combinations(range(1, points), 2)]
            assert found == pytest.approx(min(map(cost, ways)), rel=1e-12)


@pytest.mark.system("dp-timesteps")
def test_a_term_of_the_elbo_is_the_closed_form_of_a_gaussian() -> None:
    """Its denoiser's squared error is the posterior variance, var sigma^2 / (var alpha^2 + sigma^2)."""
    law, rng = Gaussian(0.7, 0.25), torch.Generator().manual_seed(0)
    grid = at(Flow(), [1.0, 0.8, 0.5, 0.2, 0.0])
    x0 = 0.7 + 0.5 * torch.randn(200_000, 1, generator=rng, dtype=torch.float64)
    table = elbo(law.denoise, x0, grid, rng)
    for i, j in ((0, 1), (0, 3), (1, 2), (2, 3)):
        a, b = grid.nodes[i], grid.nodes[j]
        error = 0.25 * a.sigma**2 / (0.25 * a.alpha**2 + a.sigma**2)
        want = (exp(2 * b.lam) - exp(2 * a.lam)) / 2 * error
        assert float(table[i, j]) == pytest.approx(want, rel=0.01)
    x0[100_000:] = torch.nan
    half = elbo(law.denoise, x0, grid, rng, rows=slice(0, 100_000))
    assert (half - table)[:-2].abs().max() < 0.02 * table[:-2].max()


def test_curvature_is_nothing_between_neighbours_of_ddims_own_run_and_grows_with_the_jump() -> None:
    run = record(tree.function("solvers", "ddim"), MODEL, noise(16), uniform(20))
    cost = curvature(run)
    assert cost.diagonal(1).max() < 1e-12
    assert (cost[0, 2:].diff() > 0).all()
    x0, eps = noise(4, 1), noise(4, 2)
    grid = uniform(10)
    line = torch.stack([n.alpha * x0 + n.sigma * eps for n in grid.nodes])
    straight = Trajectory(grid, line, x0.expand(10, -1, -1), eps.expand(10, -1, -1))
    assert curvature(straight).max() < 1e-12


def test_a_trajectory_between_its_nodes_has_an_error_of_second_order() -> None:
    fine = exact(8, 400)
    errors = []
    for steps in (10, 20, 40):
        coarse = record(tree.function("solvers", "heun"), MODEL, noise(8), uniform(steps))
        rows = [k for k in range(len(fine.grid.nodes)) if 0.3 < fine.grid.nodes[k].t < 0.95]
        errors.append(max(float((coarse.at(fine.grid.nodes[k].t) - fine.x[k]).abs().max()) for k in rows))
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3
    assert torch.equal(fine.at(fine.grid.nodes[7].t), fine.x[7])
    late = record(tree.function("solvers", "ddim"), MODEL, noise(2), at(Flow(), [0.8, 0.4]))
    with pytest.raises(ValueError, match="lies outside"):
        late.at(0.9)


def test_least_squares_finds_the_flow_of_a_gaussian_in_single_steps() -> None:
    """There the exact step is a sum of x and x0: whatever the grid, K calls are exact."""
    law, x = Gaussian(0.7, 0.25), noise(16)
    fine = record(tree.function("solvers", "heun"), law.denoise, x, uniform(800))
    grid = at(Flow(), [1.0, 0.6, 0.3, 0.0])
    weights, end = subspace(law.denoise, fine, grid, ridge=1e-12)
    want = law.flow(x, grid.nodes[0], grid.nodes[-1])
    ddim = solve(tree.function("solvers", "ddim"), law.denoise, x, grid)
    assert (end - want).abs().max() < 1e-4 < 1e-2 < (ddim - want).abs().max()
    again = solve(tree.function("solvers", "olss").given(weights=weights), law.denoise, x, grid)
    assert (again - end).abs().max() < 1e-10


def test_a_great_penalty_gives_ddim() -> None:
    run, grid = exact(8), uniform(5)
    weights, end = subspace(MODEL, run, grid, ridge=1e12)
    assert (end - solve(tree.function("solvers", "ddim"), MODEL, run.x[0], grid)).abs().max() < 1e-6
    assert [len(row) for row in weights] == [2, 3, 4, 5, 6]


def test_rows_that_only_follow_do_not_change_the_weights() -> None:
    run, grid = exact(16), uniform(4)
    alone, _ = subspace(MODEL, run.rows(slice(0, 8)), grid)
    beside, _ = subspace(MODEL, run, grid, slice(0, 8))
    assert torch.allclose(torch.tensor(alone[-1]), torch.tensor(beside[-1]), rtol=1e-8)


def test_a_rollout_is_the_solver_and_its_gradients_are_those_of_differences() -> None:
    run, grid = exact(4), uniform(4)
    weights, end = subspace(MODEL, run, grid)
    roll = Rollout(Flow(), grid, weights)
    assert (roll(MODEL, run.x[0]) - end).abs().max() < 1e-10

    def loss() -> Tensor:
        return (roll(MODEL, run.x[0]) - run.x[-1]).square().sum()

    loss().backward()
    for p, place in ((roll.gaps, (1,)), (roll.offsets, (2, 1))):
        assert p.grad is not None
        with torch.no_grad():
            h = 1e-6
            p[place] += h
            up = float(loss())
            p[place] -= 2 * h
            down = float(loss())
            p[place] += h
        assert float(p.grad[place]) == pytest.approx((up - down) / (2 * h), rel=1e-4)
    kept, rows = roll.kept()
    assert [n.t for n in kept.nodes] == pytest.approx([n.t for n in grid.nodes])
    assert [len(r) for r in rows] == [len(r) for r in weights]


def test_gradients_bring_the_end_nearer() -> None:
    run, start = exact(32), at(Flow(), [1.0, 0.9, 0.8, 0.1, 0.0])
    weights, end = subspace(MODEL, run, start)
    grid, moved = learned(MODEL, run, slice(0, 32), start, weights, 40)
    after = solve(tree.function("solvers", "olss").given(weights=moved), MODEL, run.x[0], grid)
    before, now = ((y - run.x[-1]).norm(dim=1).mean() for y in (end, after))
    assert now < 0.7 * before


def test_the_search_finds_a_valley_and_keeps_the_ends() -> None:
    want = [1.0, 0.83, 0.31, 0.07, 0.0]

    def loss(times: list[float]) -> float:
        assert all(b < a for a, b in pairwise(times))
        assert (times[0], times[-1]) == (1.0, 0.0)
        return sum((a - b) ** 2 for a, b in zip(times, want, strict=True))

    times, value = refined(loss, [1.0, 0.75, 0.5, 0.25, 0.0], 400, torch.Generator().manual_seed(0))
    assert value < 1e-4
    assert loss(times) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("name", [None, "euler", "dpmpp_2m"])
def test_a_fitted_grid_is_better_on_samples_it_has_not_seen(name: str | None) -> None:
    solver = tree.function("solvers", name) if name else None
    counted = [0]
    found = fit(
        MODEL, noise(400), Flow(), 5, solver, held=200, rng=torch.Generator().manual_seed(0),
        effort=Effort(60, 60), tick=lambda n: counted.__setitem__(0, counted[0] + n),
    )  # fmt: skip
    assert found.errors["fitted"] <= 1.05 * min(v for k, v in found.errors.items() if k != "fitted")
    fresh, grid = noise(300, seed=9), at(Flow(), found.recipe.grid)  # type: ignore[arg-type]
    want = solve(tree.function("solvers", "heun"), MODEL, fresh, uniform(60))
    fitted, plain = (
        (solve(s, MODEL, fresh, g) - want).norm(dim=1).mean()
        for s, g in ((found.recipe.solving(), grid), (solver or tree.function("solvers", "ddim"), uniform(5)))
    )
    assert fitted < (1.0 if name else 0.4) * plain
    assert {"curvature", "elbo"} < found.errors.keys()
    assert counted[0] == pytest.approx(calls(solver, 5, Effort(60, 60)), rel=0.02)


def test_what_cannot_be_fitted_is_said_in_a_line() -> None:
    rng = torch.Generator()
    for held in (0, 4):
        with pytest.raises(ValueError, match="hold back some"):
            fit(MODEL, noise(4), Flow(), 4, held=held, rng=rng)
    with pytest.raises(ValueError, match="olss can't be fitted"):
        fit(MODEL, noise(4), Flow(), 4, tree.function("solvers", "olss"), held=1, rng=rng)
    with pytest.raises(ValueError, match="weights for 0 steps and the grid has 4"):
        solve(tree.function("solvers", "olss"), MODEL, noise(2), uniform(4))
    with pytest.raises(ValueError, match=r"starts at t = 1.0, the grid at 0.9"):
        subspace(MODEL, exact(2), at(Flow(), [0.9, 0.0]))
