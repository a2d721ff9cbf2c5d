"""Critically damped Langevin: its matrices, gDDIM on them, and SSCS, on laws whose score is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from exact import distance, flown, spaced
from hasten.denoiser import Prediction
from hasten.grid import Grid, at
from hasten.path import Path
from hasten.paths.cld import CLD, PhaseNode
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.declare import Solver, Steps, solver
from hasten.solvers.drive import solve
from hasten.solvers.gddim import gddim, on_cld
from hasten.solvers.rk45 import integrate
from hasten.solvers.sscs import symmetric_splitting

KINDS = [CLD(), CLD(spread=0.25), CLD(spread=1e-4), CLD(beta=3.0, mass=2.0, gamma=0.5), CLD(gamma=1.0, spread=1.0)]
each_kind = pytest.mark.parametrize("path", KINDS, ids=str)
T = torch.tensor([0.0, 0.001, 0.05, 0.4, 1.0], dtype=torch.float64)


def drift(path: CLD) -> tuple[Tensor, Tensor]:
    """F and G G^T of du = F u dt + G dw, from the SDE as it is written in the paper."""
    damping = 2 * path.mass**0.5
    f = path.beta * torch.tensor([[0.0, 1 / path.mass], [-1.0, -damping / path.mass]], dtype=torch.float64)
    return f, torch.diag(torch.tensor([0.0, 2 * damping * path.beta], dtype=torch.float64))


def moved(rate: Callable[[Tensor], Tensor], start: Tensor, now: float, after: float) -> Tensor:
    """A matrix ODE integrated at a tolerance far below the tests'."""
    return integrate(lambda s, m: rate(m[0])[None], start[None], now, after, 1e-11, 1e-13)[0]


# the path


@pytest.mark.system("cld")
@each_kind
def test_mean_and_covariance_solve_the_moment_equations(path: CLD) -> None:
    """dA/dt = F A and dS/dt = F S + S F^T + G G^T from the identity, the start's covariance, and nothing."""
    f, g2 = drift(path)
    start = torch.diag(torch.tensor([path.spread, path.gamma * path.mass], dtype=torch.float64))
    for t, mean, covariance, noise in zip(T[1:], path.alpha(T)[1:], path.covariance(T)[1:], path.noise(T)[1:]):
        stop = float(t)
        assert (mean - moved(lambda m: f @ m, torch.eye(2).double(), 0.0, stop)).abs().max() < 1e-9
        for found, first in ((covariance, start), (noise, torch.zeros(2, 2).double())):
            want = moved(lambda m: f @ m + m @ f.T + g2, first, 0.0, stop)
            assert (found - want).abs().max() < 1e-9
    assert torch.equal(path.alpha(T)[0], torch.eye(2).double())
    assert torch.allclose(path.covariance(T)[0], start, atol=1e-15)


@pytest.mark.system("cld")
@each_kind
def test_it_is_damped_critically_and_rests_at_the_prior(path: CLD) -> None:
    """The drift has one eigenvalue, twice; long after the start u is N(0, diag(1, M))."""
    f, _ = drift(path)
    roots = torch.linalg.eigvals(f)
    assert (roots[0] - roots[1]).abs() < 1e-6 * roots.abs().max()
    late = torch.tensor(20.0, dtype=torch.float64)
    assert path.alpha(late).abs().max() < 1e-9
    assert (path.covariance(late) - torch.diag(torch.tensor([1.0, path.mass])).double()).abs().max() < 1e-9


@pytest.mark.system("gddim")
@each_kind
def test_sigma_is_the_root_along_which_eps_stays(path: CLD) -> None:
    """R R^T is the covariance, and dR/dt = F R + G G^T R^-T / 2, from t = 0.001 on."""
    f, g2 = drift(path)
    root = path.sigma(T)
    assert (root @ root.mT - path.covariance(T)).abs().max() < 1e-12
    for t, found in zip(T[2:], root[2:], strict=True):
        want = moved(lambda m: f @ m + g2 @ torch.linalg.inv(m).T / 2, root[1], float(T[1]), float(t))
        assert (found - want).abs().max() < 1e-8
    near = path.sigma(torch.tensor([0.0, 1e-13], dtype=torch.float64))
    assert (near[0] - near[1]).abs().max() < 1e-3  # the limit is met; it is met like a root of t


def test_small_times_lose_no_digits() -> None:
    """x is noised as 4/3 s^3 at first: to the leading order, down to where 1 - e^-2s (1 + 2s + 2s^2) is rounding."""
    s = torch.logspace(-7, -3, 9, dtype=torch.float64)
    noise = CLD(beta=1.0, mass=1.0).noise(s)
    assert ((noise[:, 0, 0] / (4 / 3 * s**3)) - 1).abs().max() < 2e-3
    assert (noise[:, 0, 1] / (2 * s**2) - 1).abs().max() < 3e-3
    assert (noise[:, 1, 1] / (4 * s) - 1).abs().max() < 3e-3


# laws on it


class Parts:
    """x0 ~ sum_k weight_k N(mean_k, var), v0 ~ N(0, gamma M): the exact eps of pairs u [2, B]."""

    def __init__(self, path: CLD, law: Gaussian | Mixture) -> None:
        parts = law if isinstance(law, Mixture) else Mixture((law.mean,), (1.0,), law.var)
        self.path, self.var = path, parts.var
        self.means, self.weights = (torch.tensor(v, dtype=torch.float64) for v in (parts.means, parts.weights))

    def covariance(self, t: float) -> Tensor:
        now = torch.tensor(t, dtype=torch.float64)
        start = torch.diag(torch.tensor([self.var, self.path.gamma * self.path.mass], dtype=torch.float64))
        return self.path.alpha(now) @ start @ self.path.alpha(now).mT + self.path.noise(now)

    def mean(self, t: float) -> Tensor:
        """Of u, all parts together."""
        return self.path.alpha(torch.tensor(t, dtype=torch.float64))[:, 0] * (self.weights * self.means).sum()

    def denoise(self, u: Tensor, n: PhaseNode) -> Prediction:
        precision = torch.linalg.inv(self.covariance(n.t))
        off = u[..., None] - n.alpha[:, 0, None, None] * self.means  # [2, B, K]
        pull = torch.einsum("ij,jbk->ibk", precision, off)
        part = torch.softmax(self.weights.log() - (off * pull).sum(0) / 2, -1)
        eps = n.sigma.mT @ (pull * part).sum(-1)  # -R^T score
        return Prediction(u, torch.linalg.solve(n.alpha, u - n.sigma @ eps), eps)


U = torch.tensor([[-1.3, 0.2, 2.1], [0.3, -0.6, 0.4]], dtype=torch.float64)


def cubic(path: CLD, steps: int) -> Grid:
    """From t = 0.7 to 0.2 with small first steps, as of a multistep method that starts itself."""
    along = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 3
    return on_cld(path, (0.7 - 0.5 * along).tolist())


# gDDIM


@pytest.mark.system("gddim")
@pytest.mark.parametrize("path", [Flow(), EDM(5.0), Preserving()], ids=lambda v: type(v).__name__)
def test_on_a_path_of_numbers_it_is_ddim(path: Path) -> None:
    """The reduction that the paper proves, at every step of a mixture's trajectory; from t = 1 to clean."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for times in ([1.0, 0.7, 0.4, 0.2, 0.0], [0.9, 0.1]):
        grid = at(path, times)
        ours, theirs = (solve(s, Mixture().denoise, x, grid) for s in (gddim.given(order=1), ddim))
        assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.system("gddim")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_single_step_is_exact_for_one_point_and_for_a_gaussian_that_sigma_counts_in(order: int) -> None:
    """From noise, t = 1, to data, t = 0: a point is met with any velocity, a Gaussian where its flow leads. Longer
    grids of any order stay exact, as eps does not change."""
    point = 0.7
    for path, law in ((CLD(), Gaussian(point, 0.0)), (CLD(spread=0.25), Gaussian(point, 0.25))):
        parts = Parts(path, law)
        start, end = path.sigma(T)[[-1, 0]]
        eps = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        u = parts.mean(1.0)[:, None] + start @ eps
        want = parts.mean(0.0)[:, None] + end @ eps  # along the flow of a Gaussian eps is constant
        for times in ([1.0, 0.0], [1.0, 0.6, 0.3, 0.1, 0.0]):
            if order < len(times):
                got = solve(gddim.given(order=order), parts.denoise, u, on_cld(path, times))
                assert (got - want).abs().max() < 1e-7
        if law.var == 0:
            assert (want[0] - point).abs().max() < 1e-12


@cache
def arrived(path: CLD, law: Gaussian | Mixture) -> Tensor:
    """Where U at t = 0.7 is at 0.2. Of a Gaussian R eps with the R that counts it in, eps as it was; else the
    probability-flow ODE du/dt = F u - G G^T score / 2 at 1e-9."""
    parts, (f, g2) = Parts(path, law), drift(path)
    if isinstance(law, Gaussian):
        then, now = CLD(path.beta, path.mass, path.gamma, law.var).sigma(torch.tensor([0.7, 0.2]).double())
        return parts.mean(0.2)[:, None] + now @ torch.linalg.solve(then, U - parts.mean(0.7)[:, None])

    def flow(t: float, u: Tensor) -> Tensor:
        n = path.nodes([t])[0]
        return f @ u + g2 @ torch.linalg.solve(n.sigma.mT, parts.denoise(u, n).eps) / 2

    return integrate(flow, U, 0.7, 0.2, 1e-9, 1e-10)


@pytest.mark.system("gddim")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("law", [Gaussian(), Mixture()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("path", [CLD(), CLD(spread=0.6)], ids=["point", "spread"])
def test_the_multistep_orders_on_cld(path: CLD, law: Gaussian | Mixture, order: int) -> None:
    denoise, truth = Parts(path, law).denoise, arrived(path, law)
    errors = [distance(solve(gddim.given(order=order), denoise, U, cubic(path, n)), truth) for n in (48, 96, 192)]
    first, second = (-torch.tensor(errors, dtype=torch.float64).log2().diff()).tolist()
    assert abs(2 * second - first - order) < 0.25, (first, second)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("path", [Flow(), EDM(5.0), Preserving()], ids=lambda v: type(v).__name__)
def test_the_multistep_orders_on_paths_of_numbers(path: Path, order: int) -> None:
    law, x = Mixture(), torch.linspace(-2, 2.5, 24, dtype=torch.float64)
    grids = [spaced(path, n, "start") for n in (64, 128, 256)]
    truth = flown(law, x, grids[0].nodes[0], grids[0].nodes[-1])
    errors = [distance(solve(gddim.given(order=order), law.denoise, x, grid), truth) for grid in grids]
    first, second = (-torch.tensor(errors, dtype=torch.float64).log2().diff()).tolist()
    assert abs(2 * second - first - order) < 0.25, (first, second)


def test_its_weights_are_the_papers_integrals() -> None:
    """int Psi(t', t) G G^T R^-T L_j / 2 dt, the form in the paper, by a fine midpoint sum: against the step's weights,
    got by giving the solver one eps that is not zero."""
    path, times = CLD(), [0.9, 0.75, 0.5, 0.4]
    grid, (_, g2) = on_cld(path, times), drift(path)
    fine = torch.linspace(0.5, 0.4, 4001, dtype=torch.float64)
    middle, width = (fine[1:] + fine[:-1]) / 2, fine.diff()
    carried = path.alpha(torch.tensor(0.4).double()) @ torch.linalg.inv(path.alpha(middle))
    kernel = carried @ g2 @ torch.linalg.inv(path.sigma(middle)).mT / 2
    for j, own in ((1, 0.75), (2, 0.9)):  # the last step looks back on 0.5, 0.75 and 0.9
        basis = torch.ones_like(middle)
        for other in {0.5, 0.75, 0.9} - {own}:
            basis = basis * (middle - other) / (own - other)
        want = ((width * basis)[:, None, None] * kernel).sum(0)
        for column in range(2):
            unit = torch.zeros(2, 1, dtype=torch.float64)
            unit[column] = 1

            def told(u: Tensor, n: PhaseNode, own: float = own, unit: Tensor = unit) -> Prediction:
                """The state stands at zero; eps is `unit` at one node alone."""
                return Prediction(torch.zeros_like(u), u, unit if n.t == own else torch.zeros_like(u))

            got = solve(gddim.given(order=3), told, torch.zeros(2, 1, dtype=torch.float64), grid)
            assert (got[:, 0] - want[:, column]).abs().max() < 1e-6, j


# SSCS, and what it is compared with


@solver(order=1, stochastic=True)
def euler_maruyama(u: Tensor, grid: Grid, noise: Any) -> Steps:
    """The reverse SDE of CLD as it stands."""
    path: Any = grid.path
    f, g2 = drift(path)
    for now, after in grid.steps():
        h = now.t - after.t
        p = yield u, now
        score = -torch.linalg.solve(now.sigma.mT, p.eps)
        u = u - h * f @ u + h * g2 @ score + (h * g2).sqrt() @ noise(1 - now.t, 1 - after.t, u)
    return u


@solver(order=1)
def euler(u: Tensor, grid: Grid) -> Steps:
    """The probability-flow ODE of CLD as it stands."""
    path: Any = grid.path
    f, g2 = drift(path)
    for now, after in grid.steps():
        p = yield u, now
        score = -torch.linalg.solve(now.sigma.mT, p.eps)
        u = u - (now.t - after.t) * (f @ u - g2 @ score / 2)
    return u


def missed(run: Solver, path: CLD, law: Gaussian, steps: int, power: int = 1, last: float = 1e-3) -> float:
    """Wasserstein distance of x at t = `last` from the law's, without sampling: of a Gaussian every solver here is
    affine in the start and in its noises, so one batch of unit vectors tells the mean and covariance it ends with."""
    parts = Parts(path, law)
    draws = 2 * steps if run is symmetric_splitting else steps if run.stochastic else 0
    u = torch.zeros(2, 3 + 2 * draws, dtype=torch.float64)
    u[0, 1] = u[1, 2] = 1
    drawn = 0

    def noise(start: float, stop: float, like: Tensor) -> Tensor:
        nonlocal drawn
        z = torch.zeros_like(like)
        z[0, 3 + 2 * drawn] = z[1, 4 + 2 * drawn] = 1
        drawn += 1
        return z

    times = torch.linspace(1, last ** (1 / power), steps + 1, dtype=torch.float64) ** power
    end = solve(run, parts.denoise, u, on_cld(path, times.tolist()), noise)
    assert drawn == draws
    base = end[:, :1]
    linear, pulses = end[:, 1:3] - base, end[:, 3:] - base
    mean = base[:, 0] + linear @ parts.mean(1.0)
    covariance = linear @ parts.covariance(1.0) @ linear.T + pulses @ pulses.T
    off = mean[0] - parts.mean(last)[0], covariance[0, 0] ** 0.5 - parts.covariance(last)[0, 0] ** 0.5
    return float((off[0] ** 2 + off[1] ** 2) ** 0.5)


@pytest.mark.system("cld")
@pytest.mark.parametrize("power", [1, 2])
def test_sscs_needs_fewer_steps_than_euler_maruyama(power: int) -> None:
    """For the moments of a Gaussian, from its own law at t = 1, on an even grid and the paper's quadratic one: at the
    error that SSCS has in 20 steps Euler-Maruyama needs more than 26, and both are of first order."""
    law, path = Gaussian(), CLD()
    ours = missed(symmetric_splitting, path, law, 20, power)
    assert all(missed(euler_maruyama, path, law, n, power) > ours for n in (10, 20, 26))
    assert missed(symmetric_splitting, path, law, 40, power) < 0.6 * ours
    assert missed(symmetric_splitting, path, law, 160, power) < 0.16 * ours


@pytest.mark.system("gddim")
@pytest.mark.parametrize("power", [1, 2])
def test_twenty_steps_of_gddim_miss_less_than_sscs_and_euler(power: int) -> None:
    """Where sigma counts in the data's variance the moments are exact; counting it half or double is enough to be below
    both, though sigma of a point (spread = 0) is not, of data this wide."""
    law = Gaussian(0.7, 0.25)
    best = min(missed(run, CLD(), law, 20, power) for run in (symmetric_splitting, euler, euler_maruyama))
    assert missed(gddim.given(order=1), CLD(spread=0.25), law, 20, power) < 1e-6
    for spread in (0.125, 0.5):
        assert missed(gddim.given(order=2), CLD(spread=spread), law, 20, power) < 0.9 * best
        assert missed(gddim.given(order=3), CLD(spread=spread), law, 20, power) < 0.45 * best


def test_sscs_keeps_the_law_at_rest() -> None:
    """Data that is the prior: the score cancels and each half is the exact process, so moments stay in any step."""
    path = CLD(gamma=1.0)
    assert missed(symmetric_splitting, path, Gaussian(0.0, 1.0), 3) < 1e-12


# what goes wrong


@pytest.mark.parametrize("given", [{"beta": 0.0}, {"mass": -1.0}, {"gamma": 0.0}, {"spread": -0.1}])
def test_parameters_are_above_zero(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="beta, mass and gamma must be above 0 and spread not below"):
        CLD(**given)


def test_bad_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"times lie in \[0, 1\]"):
        on_cld(CLD(), [1.2, 0.0])
    with pytest.raises(ValueError, match="two or more falling times"):
        on_cld(CLD(), [0.3, 0.3])
    with pytest.raises(ValueError, match=r"runs on critically damped Langevin: make the grid with gddim\.on_cld"):
        solve(symmetric_splitting, Gaussian().denoise, U, at(Flow(), [1.0, 0.0]), lambda a, b, like: like)
    nodes_alone = Grid(at(Flow(), [1.0, 0.5, 0.0]).nodes)
    with pytest.raises(ValueError, match=r"above order 1 gddim integrates along the path: make the grid with grid\.at"):
        solve(gddim.given(order=2), Gaussian().denoise, U, nodes_alone)
    with pytest.raises(ValueError, match="gddim of order 3 can't be had in so few steps, 2"):
        solve(gddim.given(order=3), Gaussian().denoise, U, at(Flow(), [1.0, 0.5, 0.0]))
