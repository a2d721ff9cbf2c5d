"""Langevin samplers and restart: modes found, noise levels met, errors forgotten, as their papers say."""

from __future__ import annotations

from itertools import pairwise
from math import log, sqrt

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.brownian import Brownian
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve, visited

PATHS = [Flow(), EDM(5.0), Preserving()]
LANGEVIN = tree.function("solvers", "annealed_langevin")
CAS = tree.function("solvers", "consistent_annealed")
RESTART = tree.function("solvers", "restart")
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda v: type(v).__name__)


def ladder(path: Path, levels: int, high: float = 3.0, low: float = 0.1, clean: bool = False) -> Grid:
    """Geometric levels of sigma / alpha."""
    lams = torch.linspace(-log(high), -log(low), levels, dtype=torch.float64)
    return at(path, path.time(lams).tolist() + ([0.0] if clean else []))


def shares(solver: Solver, law: Gaussian, grid: Grid) -> Tensor:
    """What the sample is made of, where the denoiser is linear: shares of the start and of every noise, [1 + noises].
    The exact variance of the sample is a sum of their squares; no draw is made."""
    drawn: list[tuple[float, float]] = []

    def count(start: float, stop: float, like: Tensor) -> Tensor:
        drawn.append((start, stop))
        return torch.zeros_like(like)

    solve(solver, law.denoise, torch.zeros(1, dtype=torch.float64), grid, count)
    sources = iter(torch.eye(1 + len(drawn), dtype=torch.float64))
    return solve(solver, law.denoise, next(sources), grid, lambda start, stop, like: next(sources))


def gaussian(rng: torch.Generator) -> object:
    return lambda start, stop, like: torch.randn(like.shape, generator=rng, dtype=like.dtype)


class TestAnnealedLangevin:
    @pytest.mark.system("ncsn")
    def test_it_recovers_mode_weights_that_plain_langevin_gets_wrong(self) -> None:
        """Two narrow modes, far apart: no path leads from one to the other at the last level, and one does at the
        first."""
        law, rng = Mixture((-2.0, 2.0), (0.8, 0.2), 0.04), torch.Generator().manual_seed(0)
        x = 8 * (torch.rand(2000, generator=rng) - 0.5)  # the paper starts from even noise
        annealed = ladder(EDM(), 10, 4.0, 0.1, clean=True)
        plain = at(EDM(), [annealed.nodes[-2].t, 0.0])
        share = {}
        for name, grid, inner in (("annealed", annealed, 100), ("plain", plain, 1000)):
            y = solve(LANGEVIN.given(inner=inner), law.denoise, x, grid, gaussian(rng))
            assert (y.abs() - 2).abs().max() < 1.2  # both find the modes
            share[name] = float((y < 0).float().mean())
        assert abs(share["annealed"] - 0.8) < 0.04
        assert abs(share["plain"] - 0.5) < 0.04

    @pytest.mark.system("ncsn")
    def test_it_is_algorithm_1_on_every_path(self) -> None:
        """Against the algorithm as it is printed, on x0 + sigma z; every path is that after division by alpha."""
        law, inner, ratio = Mixture(), 7, 0.3
        start = 3 * torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        levels = [n.sigma / n.alpha for n in ladder(Flow(), 6).nodes]
        rng, x = torch.Generator().manual_seed(2), start
        for sigma in levels:
            step = ratio * levels[-1] ** 2 * sigma**2 / levels[-1] ** 2  # epsilon sigma_i^2 / sigma_L^2
            for _ in range(inner):
                score = -law.denoise(x, Node(0.0, 1.0, sigma, 0.0, 0.0, 0.0)).eps / sigma
                x = x + step / 2 * score + sqrt(step) * torch.randn(5, generator=rng, dtype=torch.float64)
        for path in PATHS:
            grid, rng = ladder(path, 6), torch.Generator().manual_seed(2)
            solver = LANGEVIN.given(inner=inner, step=ratio)
            got = solve(solver, law.denoise, grid.nodes[0].alpha * start, grid, gaussian(rng))
            assert (got / grid.nodes[-1].alpha - x).abs().max() < 1e-9
            clean = Grid((*grid.nodes, *at(path, [0.5, 0.0]).nodes[1:]))
            rng = torch.Generator().manual_seed(2)
            noisy = solve(solver.given(denoise=False), law.denoise, grid.nodes[0].alpha * start, clean, gaussian(rng))
            assert (noisy - x).abs().max() < 1e-9

    def test_the_last_update_is_the_denoised_state(self) -> None:
        law, grid = Mixture(), ladder(Flow(), 4, clean=True)
        asked: list[Tensor] = []

        def denoise(x: Tensor, n: Node) -> Prediction:
            asked.append(x)
            return law.denoise(x, n)

        rng = torch.Generator().manual_seed(0)
        got = solve(LANGEVIN, denoise, torch.randn(4, generator=rng), grid, gaussian(rng))
        assert torch.equal(got, law.denoise(asked[-1], grid.nodes[-2]).x0)
        assert len(asked) == LANGEVIN.calls * len(grid) == 5 * 4

    @pytest.mark.parametrize("path", [Flow(), Preserving()], ids=lambda v: type(v).__name__)
    def test_it_runs_from_pure_noise_to_the_law(self, path: Path) -> None:
        """The more updates, the nearer to what denoising makes of the last level's law: variance v^2 / (v + s^2)."""
        law, grid = Gaussian(), at(path, [1 - i / 10 for i in range(11)])
        want = law.var**2 / (law.var + (grid.nodes[-2].sigma / grid.nodes[-2].alpha) ** 2)
        errors = []
        for inner in (10, 40, 160):
            made = shares(LANGEVIN.given(inner=inner), Gaussian(0.0, law.var), grid)
            errors.append(abs(float(made.square().sum()) / want - 1))
        assert errors[0] > 2 * errors[1] > 4 * errors[2]
        assert errors[2] < 0.06
        asked: list[Tensor] = []

        def denoise(x: Tensor, n: Node) -> Prediction:
            asked.append(x)
            return law.denoise(x, n)

        start = torch.ones(1, dtype=torch.float64)
        mean = solve(LANGEVIN.given(inner=40), denoise, start, grid, lambda a, b, like: torch.zeros_like(like))
        assert float(mean) == pytest.approx(law.mean, abs=1e-3)
        if path == Flow():  # from pure noise, where eps is the state, to the next level as noise of its size
            assert float(asked[40]) == pytest.approx(0.9**40 * grid.nodes[1].sigma, rel=1e-9)

    @pytest.mark.system("ncsn")
    def test_the_least_denoising_loss_is_at_the_true_score(self) -> None:
        """Denoising score matching on 1-D data: what the solver needs is what minimises sigma^2 |s(x) + z / sigma|^2.
        The minimum over a wide linear class (bumps) is a least squares problem, solved here, not trained for."""
        law, sigma, size = Mixture(), 0.4, 200_000
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(size, generator=rng)
        x = (law.sample(size, rng) + sigma * z).double()

        def bumps(x: Tensor) -> Tensor:
            return torch.exp(-((x[:, None] - torch.linspace(-3.5, 4, 30, dtype=torch.float64)) ** 2) / 0.3)

        weights = torch.linalg.lstsq(bumps(x), -z.double()[:, None]).solution
        at_x = torch.linspace(-2, 2.5, 40, dtype=torch.float64)
        fitted = (bumps(at_x) @ weights)[:, 0] / sigma
        true = -law.denoise(at_x, Node(0.0, 1.0, sigma, 0.0, 0.0, 0.0)).eps / sigma
        assert (fitted - true).abs().mean() < 0.03 * true.abs().mean()


class TestConsistentAnnealed:
    @pytest.mark.system("consistent-annealed-sampling")
    @each_path
    def test_noise_is_on_its_level_after_every_step_and_plain_langevin_is_not(self, path: Path) -> None:
        """Noise around one data point, whose x0 the denoiser knows: the variance of x / alpha, exactly, step by
        step."""
        law, grid = Gaussian(0.0, 0.0), ladder(path, 12)
        lag = 0.0
        for k in range(1, 12):
            part = Grid(grid.nodes[: k + 1], path)
            got, langevin = (
                grid.nodes[0].sigma ** 2 * c[0] ** 2 + c[1:].square().sum()
                for c in (shares(CAS, law, part), shares(LANGEVIN.given(inner=1, step=0.5), law, part))
            )
            assert float(got.sqrt()) == pytest.approx(grid.nodes[k].sigma, rel=1e-12)
            lag = max(lag, float(langevin.sqrt()) / grid.nodes[k].sigma - 1)
        assert lag > 0.1

    @pytest.mark.system("consistent-annealed-sampling")
    @each_path
    def test_on_a_broad_law_a_step_misses_by_what_x0_does_not_know(self, path: Path) -> None:
        """x0 of a Gaussian of variance v shrinks: with s the level and k the noise kept, a step from the exact law ends
        at v + s'^2 less (s' k - s)^2 v / (v + s^2)."""
        law, grid = Gaussian(0.0, 0.25), ladder(path, 9)
        now, after = grid.nodes[4:6]
        c = shares(CAS, law, Grid((now, after), path))
        got = c[0] ** 2 * (law.var * now.alpha**2 + now.sigma**2) + c[1] ** 2
        s, s_after = now.sigma / now.alpha, after.sigma / after.alpha
        kept = min(1, 0.5 * s / s_after)
        want = law.var + s_after**2 - (s_after * kept - s) ** 2 * law.var / (law.var + s**2)
        assert float(got) / after.alpha**2 == pytest.approx(want, rel=1e-12)

    @each_path
    def test_eta_runs_from_ddim_to_fresh_noise(self, path: Path) -> None:
        law, x = Mixture(), torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        grid = at(path, [1 - i / 6 for i in range(7)])
        want = solve(tree.function("solvers", "ddim"), law.denoise, x, grid)
        assert torch.equal(solve(CAS.given(eta=0.0), law.denoise, x, grid, Brownian((0,))), want)
        want = solve(tree.function("solvers", "consistency"), law.denoise, x, grid, Brownian((0,)))
        assert torch.equal(solve(CAS.given(eta=1.0), law.denoise, x, grid, Brownian((0,))), want)

    @pytest.mark.system("consistent-annealed-sampling")
    def test_final_denoising_brings_pictures_nearer(self) -> None:
        """Frechet distance to real pictures, emoji of 8 x 8 grey pixels, with the exact denoiser of their law."""
        from hasten.measure.frechet import Moments, frechet
        from hasten.reference.emoji import pictures

        data = torch.nn.functional.avg_pool2d(pictures()[::4].float().mean(1, keepdim=True), 8).flatten(1)
        data = (data - data.mean()) / data.std()

        def denoise(x: Tensor, n: Node) -> Prediction:
            near = torch.softmax(-torch.cdist(x, n.alpha * data).square() / (2 * n.sigma**2), -1)
            return Prediction.of("x0", near @ data, x, n)

        rng, grid = torch.Generator().manual_seed(0), ladder(EDM(20.0), 16, 20.0, 0.3, clean=True)
        x = 20 * torch.randn(500, 64, generator=rng)
        real = Moments.of(data)
        ends = []
        for solver, path in ((CAS, Grid(grid.nodes[:-1])), (CAS, grid), (LANGEVIN.given(inner=1), grid)):
            y = solve(solver, denoise, x, path, gaussian(torch.Generator().manual_seed(1)))
            ends.append(frechet(Moments.of(y), real))
        noisy, denoised, langevin = ends
        assert denoised < 0.7 * noisy
        assert denoised < 0.3 * langevin  # at equal calls


class TestRestart:
    @each_path
    @pytest.mark.parametrize("base", ["heun", "ddim"])
    def test_no_rounds_are_the_base_bit_for_bit(self, base: str, path: Path) -> None:
        law, x = Mixture(), torch.randn(6, generator=torch.Generator().manual_seed(0))
        for times in ([1 - i / 9 for i in range(10)], [0.8, 0.6, 0.3, 0.2], [1.0, 0.5, 0.0], [1.0, 0.0]):
            grid = at(path, times)
            want = solve(tree.function("solvers", base), law.denoise, x, grid)
            got = solve(RESTART.given(base=base, rounds=0), law.denoise, x, grid, Brownian((0,)))
            assert torch.equal(got, want)

    @pytest.mark.parametrize("base", ["heun", "ddim"])
    def test_calls(self, base: str) -> None:
        """N steps and `rounds` times those of the interval, each of the base's calls; Heun's last step is one."""
        grid = ladder(Flow(), 13, 3.2, 0.05, clean=True)  # 0.06 and 0.3 are nearest to nodes 11 and 7
        for rounds in (0, 1, 3):
            solver = RESTART.given(base=base, rounds=rounds)
            calls = visited(solver, grid)
            assert len(calls) == solver.calls * (len(grid) + rounds * 4) - (solver.calls - 1)
            assert calls.count(grid.nodes[9]) == solver.calls * (1 + rounds)

    @each_path
    def test_restarts_forget_an_error_by_the_factor_of_theory(self, path: Path) -> None:
        """Xu et al. 2023, theorem 2: noise up contracts. On a Gaussian a round takes an error of the variance times
        (v + s_min^2) / (v + s_max^2), and the law itself stays as it is."""
        law, grid = Gaussian(0.0, 0.25), ladder(path, 61, 3.0, 0.03)
        first, last = grid.nodes[0], grid.nodes[-1]
        right = law.var * first.alpha**2 + first.sigma**2
        errors = []
        for rounds in range(4):
            c = shares(RESTART.given(rounds=rounds), law, grid).square()
            exact = law.var * last.alpha**2 + last.sigma**2
            assert float(c[0] * right + c[1:].sum()) == pytest.approx(exact, rel=2e-3)
            errors.append(float(c[0]) * right / exact)  # of a variance twice too large
        s_min, s_max = (
            min((n.sigma / n.alpha for n in grid.nodes), key=lambda s: abs(log(s / e))) for e in (0.06, 0.3)
        )
        factor = (law.var + s_min**2) / (law.var + s_max**2)
        for one, next_one in pairwise(errors):
            assert next_one / one == pytest.approx(factor, rel=2e-3)

    @each_path
    @pytest.mark.parametrize(("base", "order"), [("heun", 2), ("ddim", 1)])
    def test_error_falls_with_the_bases_order_where_the_ends_stay(self, base: str, order: int, path: Path) -> None:
        """Every share of start and noise against the exact flow's."""
        law, solver = Gaussian(0.0, 0.25), RESTART.given(base=base, rounds=2, low=0.1, high=0.8)
        errors = []
        for n in (60, 120, 240):
            grid = ladder(path, n + 1, 3.2, 0.05)  # six halvings: 0.8 and 0.1 are nodes of all three
            first, last = grid.nodes[0], grid.nodes[-1]
            top, bottom = (min(grid.nodes, key=lambda v: abs(v.sigma / v.alpha - e)) for e in (0.8, 0.1))
            assert bottom.sigma / bottom.alpha == pytest.approx(0.1, rel=1e-6)

            def spread(v: Node) -> float:
                return sqrt(law.var * v.alpha**2 + v.sigma**2)

            down, scale = spread(bottom) / spread(top), top.alpha / bottom.alpha
            fresh = sqrt(top.sigma**2 - (scale * bottom.sigma) ** 2) * down
            begin = torch.tensor([spread(bottom) / spread(first), 0, 0], dtype=torch.float64)
            begin = scale * down * begin + torch.tensor([0, fresh, 0])
            begin = scale * down * begin + torch.tensor([0, 0, fresh])
            errors.append((shares(solver, law, grid) - begin * spread(last) / spread(bottom)).abs().max())
        slopes = torch.stack(errors).log2().diff().neg()
        assert (slopes - order).abs().max() < 0.15, slopes

    def test_an_interval_upside_down_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"got low=0.5, high=0.1: swap them"):
            solve(
                RESTART.given(low=0.5, high=0.1), Gaussian().denoise, torch.zeros(1), ladder(Flow(), 5), Brownian((0,))
            )


@each_path
@pytest.mark.parametrize("name", ["annealed_langevin", "consistent_annealed", "restart", "consistency", "lcm", "tcd"])
def test_no_noise_is_used_twice(name: str, path: Path) -> None:
    """Stretches of the clock do not overlap, so the noises of a run are independent."""
    solver = tree.function("solvers", name)
    solver = solver.given(rounds=3) if name == "restart" else solver
    used: list[tuple[float, float]] = []

    def note(start: float, stop: float, like: Tensor) -> Tensor:
        used.append((start, stop))
        return like

    grid = at(path, [1 - i / 8 for i in range(9)])
    solve(solver, Gaussian().denoise, torch.zeros(1, dtype=torch.float64), grid, note)
    assert len(used) >= 2
    assert all(start < stop for start, stop in used)
    assert all(b <= c for (_, b), (c, _) in pairwise(sorted(used)))
