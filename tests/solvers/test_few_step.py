"""Samplers of distilled networks, on networks that are exact: the law comes out in 1, 2 and 4 steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.brownian import Brownian
from hasten.denoiser import Denoiser, Prediction, denoiser, on_path
from hasten.grid import Grid, Node, at, nodes
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve
from hasten.solvers.flow_map import jumps

PATHS = [Flow(), EDM(5.0), Preserving()]
NAMES = ["consistency", "lcm", "tcd", "flow_map"]
FEW = {name: tree.function("solvers", name) for name in NAMES}
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda v: type(v).__name__)
CLEAN = nodes(Flow(), [0.0])[0]
LAW = Gaussian()

Move = Callable[[Tensor, Node, Node], Tensor]
"""(x, now, after) -> where the flow takes x."""


def even(path: Path, steps: int) -> Grid:
    return at(path, [1 - i / steps for i in range(steps + 1)])


def told(move: Move) -> Denoiser:
    """The exact network of a flow: x0 and eps with x = alpha x0 + sigma eps that lead to the end that it is told; to
    clean, where it is told none."""

    def ask(x: Tensor, n: Node) -> Prediction:
        end = n.end or CLEAN
        there = move(x, n, end)
        if n.alpha == 0:  # eps is the state
            return Prediction(x, (there - end.sigma * x) / end.alpha, x)
        ratio = end.alpha / n.alpha
        eps = (there - ratio * x) / (end.sigma - ratio * n.sigma)
        return Prediction(x, (x - n.sigma * eps) / n.alpha, eps)

    return ask


def to_the_end(move: Move) -> Denoiser:
    """An exact consistency function, whatever end it is told."""
    return lambda x, n: told(move)(x, replace(n, end=None))


def transport(law: Mixture) -> Move:
    """The flow of a law of one dimension: it keeps the quantiles. By bisection."""

    def cdf(x: Tensor, n: Node) -> Tensor:
        spread = (law.var * n.alpha**2 + n.sigma**2) ** 0.5
        off = (x[..., None] - n.alpha * torch.tensor(law.means).to(x)) / spread
        return (torch.special.ndtr(off) * torch.tensor(law.weights).to(x)).sum(-1)

    def move(x: Tensor, now: Node, after: Node) -> Tensor:
        quantile, low, high = cdf(x, now), torch.full_like(x, -40), torch.full_like(x, 40)
        for _ in range(60):
            middle = (low + high) / 2
            below = cdf(middle, after) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    return move


def moments(solver: Solver, denoise: Denoiser, grid: Grid) -> tuple[float, float]:
    """Exact mean and variance of the sample where the denoiser is affine and the start has its level's law: the mean
    follows from no noise at all, the variance from the share of the start and of every noise."""
    first, drawn = grid.nodes[0], 0
    middle = torch.full((1,), first.alpha * LAW.mean, dtype=torch.float64)

    def none(start: float, stop: float, like: Tensor) -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.zeros_like(like)

    mean = solve(solver, denoise, middle, grid, none)
    spread = (LAW.var * first.alpha**2 + first.sigma**2) ** 0.5
    sources = iter(torch.eye(1 + drawn, dtype=torch.float64))
    start = middle + spread * next(sources)
    out = solve(solver, denoise, start, grid, lambda start, stop, like: next(sources)) - mean
    return float(mean), float(out.square().sum())


def network(x: Tensor) -> Tensor:
    """Any output, for agreement with a peer's step."""
    return torch.sin(3 * x) + 0.3 * x


@each_path
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_an_exact_network_gives_the_laws_moments_in_any_number_of_steps(name: str, steps: int, path: Path) -> None:
    exact = told(LAW.flow) if name in ("tcd", "flow_map") else to_the_end(LAW.flow)
    mean, var = moments(FEW[name], exact, even(path, steps))
    assert mean == pytest.approx(LAW.mean, rel=1e-6)  # lcm's c_skip is 6e-8 of the state at sigma / alpha = 5
    assert var == pytest.approx(LAW.var, rel=1e-6)


@each_path
@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.7, 1.0])
def test_tcd_keeps_the_law_at_every_gamma(gamma: float, path: Path) -> None:
    mean, var = moments(FEW["tcd"].given(gamma=gamma), told(LAW.flow), even(path, 5))
    assert mean == pytest.approx(LAW.mean, rel=1e-9)
    assert var == pytest.approx(LAW.var, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_mixture_comes_out_of_four_steps(name: str) -> None:
    """Kolmogorov's distance between the samples and the law, at the level that 1 in 1000 draws of it exceed."""
    law, size, path = Mixture(), 4000, Flow()
    move = transport(law)
    exact = told(move) if name in ("tcd", "flow_map") else to_the_end(move)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=rng, dtype=torch.float64)
    y = solve(FEW[name], exact, x, even(path, 4), Brownian.of(rng)).sort().values
    spread = law.var**0.5
    cdf = (torch.special.ndtr((y[:, None] - torch.tensor(law.means)) / spread) * torch.tensor(law.weights)).sum(-1)
    rank = torch.arange(size, dtype=torch.float64) / size
    assert torch.maximum(cdf - rank, rank + 1 / size - cdf).max() < 1.95 / size**0.5


class TestConsistency:
    @each_path
    def test_an_answer_that_keeps_its_least_noise_is_noised_by_the_rest(self, path: Path) -> None:
        """f of a model trained down to epsilon ends at that level: at every step the law of data plus epsilon."""
        epsilon = 0.3
        (bottom,) = even(path, 1).met([-log(epsilon)])
        denoise = told(lambda x, now, after: LAW.flow(x, now, bottom) / bottom.alpha)
        for steps in (2, 4):
            _, var = moments(FEW["consistency"].given(smallest=epsilon), denoise, even(path, steps))
            assert var == pytest.approx(LAW.var + epsilon**2, rel=1e-9)
            _, over = moments(FEW["consistency"], denoise, even(path, steps))
            assert over > var * 1.005

    def test_equals_diffusers(self) -> None:
        """Consistency models' own scheduler holds c_skip and c_out, which here belong to the denoiser."""
        from diffusers import CMStochasticIterativeScheduler

        peer = CMStochasticIterativeScheduler(clip_denoised=False)
        peer.set_timesteps(4)
        x = 80 * torch.randn(6, generator=torch.Generator().manual_seed(0))
        rng, theirs = torch.Generator().manual_seed(1), x
        for t in peer.timesteps:
            peer.scale_model_input(theirs, t)
            theirs = peer.step(network(theirs), t, theirs, generator=rng).prev_sample

        def denoise(x: Tensor, n: Node) -> Prediction:
            c_skip = 0.25 / ((n.sigma - 0.002) ** 2 + 0.25)
            c_out = (n.sigma - 0.002) * 0.5 / (n.sigma**2 + 0.25) ** 0.5
            return Prediction.of("x0", c_skip * x + c_out * network(x), x, n)

        grid = at(EDM(80.0), [s / 80 for s in peer.sigmas[:-1].tolist()] + [0.0])
        ours = solve(
            FEW["consistency"].given(smallest=0.002), denoise, x, grid, _draws(torch.Generator().manual_seed(1))
        )
        assert (ours - theirs).abs().max() < 1e-4

    def test_equals_diffusers_on_a_flow(self) -> None:
        from diffusers import FlowMatchLCMScheduler

        peer = FlowMatchLCMScheduler()
        peer.set_timesteps(4)
        x = torch.randn(6, generator=torch.Generator().manual_seed(0))
        rng, theirs = torch.Generator().manual_seed(1), x
        for t in peer.timesteps:
            theirs = peer.step(network(theirs), t, theirs, generator=rng).prev_sample
        flow = denoiser(lambda x, t: network(x), "flow")
        grid = at(Flow(), peer.sigmas.tolist())
        ours = solve(FEW["consistency"], flow, x, grid, _draws(torch.Generator().manual_seed(1)))
        assert (ours - theirs).abs().max() < 1e-5


class Discrete:
    """A peer's table of alpha_bar, its step i at t = i / 999: no clean end."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.bar = alphas_cumprod.double()

    def _bar(self, t: Tensor) -> Tensor:
        return self.bar[(t * 999).round().long()]

    def alpha(self, t: Tensor) -> Tensor:
        return self._bar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._bar(t)).sqrt()

    def time(self, lam: Tensor) -> Tensor:
        raise NotImplementedError


def _draws(rng: torch.Generator) -> Any:
    return lambda start, stop, like: torch.randn(like.shape, generator=rng, dtype=like.dtype)


STEPS = [996, 748, 500, 248]


@pytest.mark.parametrize("scaling", [10.0, 1e-3])
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_lcm_equals_diffusers(target: str, scaling: float) -> None:
    """On the same noise, at its own scaling of time and at one that makes the boundary scalings matter."""
    from diffusers import LCMScheduler

    peer = LCMScheduler(prediction_type=target, timestep_scaling=scaling)
    peer.set_timesteps(timesteps=STEPS)
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    rng, theirs = torch.Generator().manual_seed(1), x
    for t in peer.timesteps:
        theirs = peer.step(network(theirs), t, theirs, generator=rng).prev_sample
    grid = at(Discrete(peer.alphas_cumprod), [t / 999 for t in STEPS])
    ends = Grid((*grid.nodes, CLEAN))
    read = denoiser(lambda x, t: network(x), "eps" if target == "epsilon" else "v")
    lcm = FEW["lcm"].given(scaling=scaling * 999)
    ours = solve(lcm, read, x, ends, _draws(torch.Generator().manual_seed(1)))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_tcd_equals_diffusers(gamma: float) -> None:
    """On the same noise. Its floor((1 - gamma) i) is met by steps i whose quarters are whole; its last step ends at the
    table's first entry, not clean."""
    from diffusers import TCDScheduler

    peer = TCDScheduler(prediction_type="epsilon")
    peer.set_timesteps(timesteps=STEPS)
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    rng, theirs = torch.Generator().manual_seed(1), x
    for t in peer.timesteps:
        theirs = peer.step(network(theirs), t, theirs, eta=gamma, generator=rng).prev_sample
    grid = at(Discrete(peer.alphas_cumprod), [t / 999 for t in [*STEPS, 0]])
    read = denoiser(lambda x, t: network(x), "eps")
    ours = solve(FEW["tcd"].given(gamma=gamma), read, x, grid, _draws(torch.Generator().manual_seed(1)))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@each_path
def test_lcm_without_boundary_and_tcd_at_its_ends_are_the_others(path: Path) -> None:
    law, grid = Mixture(), even(path, 5)
    x = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def run(solver: Solver) -> Tensor:
        return solve(solver, law.denoise, x, grid, Brownian((0,)))

    assert torch.equal(run(FEW["tcd"].given(gamma=0.0)), run(FEW["flow_map"]))
    assert torch.allclose(run(FEW["tcd"].given(gamma=1.0)), run(FEW["consistency"]), atol=1e-12)
    assert torch.allclose(run(FEW["lcm"].given(scaling=1e6)), run(FEW["consistency"]), atol=1e-8)
    assert (run(FEW["lcm"].given(scaling=1.0)) - run(FEW["consistency"])).abs().max() > 1e-3


def test_tcd_needs_the_path_for_the_times_it_goes_down_to() -> None:
    grid = Grid(even(Flow(), 4).nodes)
    with pytest.raises(ValueError, match=r"make the grid with grid.at\(path, times\)"):
        solve(FEW["tcd"], LAW.denoise, torch.zeros(1), grid, Brownian((0,)))
    solve(FEW["tcd"].given(gamma=0.0), LAW.denoise, torch.zeros(1), grid, Brownian((0,)))


class TestFlowMap:
    @each_path
    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_an_exact_map_is_the_flow_in_any_number_of_steps(self, steps: int, path: Path) -> None:
        x = torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)
        grid = even(path, steps)
        for move in (LAW.flow, transport(Mixture())):
            got = solve(FEW["flow_map"], told(move), x, grid)
            assert (got - move(x, grid.nodes[0], grid.nodes[-1])).abs().max() < 1e-7

    @each_path
    def test_a_network_that_is_told_no_end_makes_it_ddim(self, path: Path) -> None:
        x, law, grid = torch.randn(5, generator=torch.Generator().manual_seed(0)), Mixture(), even(path, 6)
        want = solve(tree.function("solvers", "ddim"), law.denoise, x, grid)
        assert torch.equal(solve(FEW["flow_map"], law.denoise, x, grid), want)

    def test_average_velocities_are_read(self) -> None:
        """Shortcut models and MeanFlow: u(x, t, r) = (x_r - x) / (r - t) on the straight path; at r = t the velocity,
        so that Heun's method runs the same network, with its own error."""
        x = torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)

        def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            now, end = nodes(Flow(), [float(t[0]), float(r[0])])
            if now == end:
                p = LAW.denoise(x, now)
                return p.eps - p.x0
            return (LAW.flow(x, now, end) - x) / (end.t - now.t)

        denoise, want = jumps(average, "flow"), LAW.flow(x, *even(Flow(), 1).nodes)
        for steps in (1, 3):
            assert (solve(FEW["flow_map"], denoise, x, even(Flow(), steps)) - want).abs().max() < 1e-12
        heun = tree.function("solvers", "heun")
        errors = [(solve(heun, denoise, x, even(Flow(), n)) - want).abs().max() for n in (40, 80)]
        assert errors[1] < errors[0] / 3 and errors[1] < 1e-2

    def test_consistency_trajectory_models_are_read(self) -> None:
        """G(x, s, s') = (s' / s) x + (1 - s' / s) g(x, s, s') on alpha = 1: g is the x0 of the jump."""
        path, x = EDM(5.0), torch.tensor([-4.0, 1.0, 6.0], dtype=torch.float64)

        def g(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            now, end = nodes(path, [float(t[0]), float(r[0])])
            share = end.sigma / now.sigma
            return (LAW.flow(x, now, end) - share * x) / (1 - share)

        for steps in (1, 3):
            grid = even(path, steps)
            got = solve(FEW["flow_map"], jumps(g, "x0"), x, grid)
            assert (got - LAW.flow(x, grid.nodes[0], grid.nodes[-1])).abs().max() < 1e-12

    def test_the_end_is_told_on_another_path_too(self) -> None:
        """A flow map of the straight path, asked on a variance preserving one: still exact."""
        path, x = Preserving(), torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)
        ends: list[Node | None] = []

        def known(x: Tensor, n: Node) -> Prediction:
            ends.append(n.end)
            return told(LAW.flow)(x, n)

        grid = even(path, 3)
        got = solve(FEW["flow_map"], on_path(known, Flow()), x, grid)
        assert (got - LAW.flow(x, grid.nodes[0], grid.nodes[-1])).abs().max() < 1e-9
        assert [e.lam for e in ends if e] == pytest.approx([n.lam for n in grid.nodes[1:]])

    def test_equals_diffusers(self) -> None:
        from diffusers import FlowMapEulerDiscreteScheduler

        peer = FlowMapEulerDiscreteScheduler(shift=3.0)
        peer.set_timesteps(4)
        x = torch.randn(6, generator=torch.Generator().manual_seed(0))
        theirs = x
        for t in peer.timesteps:
            theirs = peer.step(network(theirs), t, theirs).prev_sample
        ours = solve(FEW["flow_map"], jumps(lambda x, t, r: network(x), "flow"), x, at(Flow(), peer.sigmas.tolist()))
        assert (ours - theirs).abs().max() < 1e-5
