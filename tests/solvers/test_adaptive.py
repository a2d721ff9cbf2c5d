"""Adaptive integration: Dormand-Prince on the probability-flow ODE, densities along it, and ODEs as layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hasten
from families import FAMILIES
from hasten import Recipe
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at, build
from hasten.grids.log_snr import log_snr
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.recipe import RecipeError
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.dpmpp_2m import dpmpp_2m
from hasten.solvers.drive import solve
from hasten.solvers.likelihood import log_density, transported
from hasten.solvers.neural_ode import flow
from hasten.solvers.rk45 import A, C, E, angle, integrate, rk45

PATHS = [Flow(), EDM(80.0), Preserving()]
LAWS = [Gaussian(), Mixture()]
X = torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda v: type(v).__name__)
each_law = pytest.mark.parametrize("law", LAWS, ids=lambda v: type(v).__name__)


def sampled(path: Path, law: Gaussian | Mixture, tol: float, ends: tuple[float, float]) -> tuple[Tensor, int]:
    """(sample, calls) of rk45 between two times, from x of the path's own scale."""
    grid, calls = at(path, ends), 0

    def denoise(x: Tensor, n: Node) -> Prediction:
        nonlocal calls
        calls += 1
        return law.denoise(x, n)

    x = X * math.hypot(grid.nodes[0].alpha, grid.nodes[0].sigma)
    return solve(rk45.given(rtol=tol, atol=tol), denoise, x, grid), calls


def wave(s: float, y: Tensor) -> Tensor:
    """A bent ODE of closed form, y(s) = y(0) exp(sin(3 s))."""
    return 3 * math.cos(3 * s) * y


def in_steps(steps: int) -> Tensor:
    """`wave` on [0, 1] in even steps: each runs under tolerances that nothing fails."""
    y = X.clone()
    for i in range(steps):
        y = integrate(wave, y, i / steps, (i + 1) / steps, 1e9, 1e9)
    return y


def test_fixed_steps_have_order_five() -> None:
    truth = X * math.exp(math.sin(3.0))
    errors = torch.stack([(in_steps(n) - truth).abs().max() for n in (16, 32, 64)])
    slopes = errors.log2().diff().neg()
    assert (slopes - 5).abs().max() < 0.15, slopes


def test_the_tableau_is_the_peers() -> None:
    """scipy's RK45 is the same pair; rows sum to their times, and the error's weights to nothing."""
    peer = pytest.importorskip("scipy.integrate").RK45
    for i, (c, row) in enumerate(zip(C[:-1], A[:-1], strict=True)):
        assert abs(sum(row) - c) < 1e-14 and abs(peer.C[i + 1] - c) < 1e-15
        assert torch.allclose(torch.tensor(row).double(), torch.tensor(peer.A[i + 1, : i + 1]), atol=1e-7)
    assert abs(sum(E)) < 1e-16
    assert max(abs(a - b) for a, b in zip(A[-1], peer.B, strict=True)) < 1e-16
    assert max(abs(a + b) for a, b in zip(E, peer.E, strict=True)) < 1e-16


def test_it_asks_no_more_than_the_peer() -> None:
    """scipy's solve_ivp on the same ODE, tolerances and norm: as many slopes, to a tenth, and as exact."""
    solve_ivp = pytest.importorskip("scipy.integrate").solve_ivp
    asked = 0

    def counted(s: float, y: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return wave(s, y)

    ours = integrate(counted, X[None], 0.0, 3.0, 1e-8, 1e-8)[0]
    theirs = solve_ivp(lambda s, y: 3 * math.cos(3 * s) * y, (0.0, 3.0), X.numpy(), rtol=1e-8, atol=1e-8)
    truth = X * math.exp(math.sin(9.0))
    assert asked <= 1.1 * theirs.nfev, (asked, theirs.nfev)
    assert (ours - truth).abs().max() <= max(1e-7, abs(theirs.y[:, -1] - truth.numpy()).max())


@pytest.mark.system("score-sde", "neural-ode")
@each_law
@each_path
def test_the_error_follows_the_tolerance_and_the_calls_its_fifth_root(path: Path, law: Gaussian | Mixture) -> None:
    """From t = 1 to clean, which of Flow is from pure noise. Gaussian: against the exact flow."""
    ends = (1.0, 0.0)
    if isinstance(law, Gaussian):
        grid = at(path, ends)
        truth = law.flow(X * math.hypot(grid.nodes[0].alpha, grid.nodes[0].sigma), *grid.nodes)
    else:
        truth = sampled(path, law, 1e-11, ends)[0]
    tols = (1e-4, 1e-6, 1e-8, 1e-10)
    runs = [sampled(path, law, tol, ends) for tol in tols]
    for tol, (got, _) in zip(tols, runs, strict=True):
        assert (got - truth).abs().max() < 6 * tol, tol
    rise = math.log(runs[3][1] / runs[1][1]) / math.log(tols[1] / tols[3])
    assert 0.15 < rise < 0.22, [calls for _, calls in runs]


def test_tolerance_buys_more_than_steps() -> None:
    """At equal calls it is nearer the exact flow than the second-order solver on its own grid, from pure noise."""
    path, law = Flow(), Gaussian()
    grid = build(path, log_snr, 50)
    truth = law.flow(X, at(path, [1.0, 0.0]).nodes[0], grid.nodes[-1])
    got, calls = sampled(path, law, 1e-6, (1.0, 0.0))
    assert calls <= 50
    assert 30 * (got - truth).abs().max() < (solve(dpmpp_2m, law.denoise, X, grid) - truth).abs().max()


def test_steps_are_short_where_the_slope_is_steep_alone() -> None:
    """tanh(40 (s - 1/2)) rises in a fifth of the way; more than half of the slopes are asked for there."""
    times: list[float] = []

    def bump(s: float, y: Tensor) -> Tensor:
        times.append(s)
        return torch.full_like(y, 40 / math.cosh(40 * (s - 0.5)) ** 2)

    got = integrate(bump, torch.zeros(1, 1, dtype=torch.float64), 0.0, 1.0, 1e-7, 1e-7)
    assert abs(got.item() - 2 * math.tanh(20.0)) < 1e-6
    assert sum(abs(t - 0.5) < 0.1 for t in times) > 0.5 * len(times)


def test_one_row_sets_the_step_for_all() -> None:
    """The norm is the worst row's, so that a sample is as exact beside a hundred easy ones as alone, to the bit."""
    rate = torch.tensor([[1.0], *[[0.0]] * 99], dtype=torch.float64)
    alone, beside = (
        integrate(lambda s, y: wave(s, y) * rate[: len(y)], torch.ones(rows, 1).double(), 0.0, 1.0, 1e-6, 1e-6)
        for rows in (1, 100)
    )
    assert torch.equal(alone[0], beside[0])
    assert torch.equal(beside[1:], torch.ones(99, 1).double())


def test_clean_is_never_asked_for_and_a_noisy_end_is_met_exactly() -> None:
    seen: list[Node] = []

    def note(x: Tensor, n: Node) -> Prediction:
        seen.append(n)
        return Gaussian().denoise(x, n)

    solve(rk45, note, X, at(Flow(), [1.0, 0.0]))
    assert seen[0].alpha == 0 and not any(n.clean for n in seen)
    seen.clear()
    grid = at(Flow(), [0.8, 0.3])
    solve(rk45, note, X, grid)
    assert (seen[0], seen[-1]) == grid.nodes
    assert [angle(n) for n in at(Flow(), [1.0, 0.5, 0.0]).nodes] == [math.pi / 2, math.pi / 4, 0.0]
    seen.clear()  # a start below where the last step begins: that step alone
    near = at(Flow(), [1e-4, 0.0])
    got = solve(rk45, note, X, near)
    assert len(seen) == 1 and torch.equal(got, Gaussian().denoise(X, near.nodes[0]).x0)


# densities


def analytic(law: Mixture, x: Tensor, shrink: float = 1.0, noise: float = 0.0) -> Tensor:
    """log density of shrink * x0 + noise * eps, summed over a row's elements."""
    means, weights = torch.tensor(law.means).to(x) * shrink, torch.tensor(law.weights).to(x)
    var = law.var * shrink**2 + noise**2
    parts = weights.log() - (x[..., None] - means) ** 2 / (2 * var) - math.log(2 * math.pi * var) / 2
    return torch.logsumexp(parts, -1).flatten(1).sum(1)


@pytest.mark.system("score-sde", "neural-ode")
@each_path
def test_the_flows_likelihood_is_the_mixtures_density(path: Path) -> None:
    """To 1e-3, in one dimension across the law and in three. Flow ends in pure noise, whose density is the standard
    normal's; where t = 1 still holds a trace of the data the prior that makes it exact is the law's own there."""
    law, end = Mixture(), at(path, [1.0, 0.0]).nodes[0]
    size = math.hypot(end.alpha, end.sigma)
    prior = None if end.alpha == 0 else lambda y: analytic(law, y, end.alpha / size, end.sigma / size)
    row = torch.linspace(-2, 2.5, 13, dtype=torch.float64)[:, None]
    cube = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for x in (row, cube):
        found = log_density(law.denoise, x, path, rtol=1e-6, atol=1e-6, prior=prior)
        assert (found - analytic(law, x)).abs().max() < 1e-3


CORRELATED = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)


def correlated(x: Tensor, n: Node) -> Prediction:
    """The denoiser of x0 ~ N(0, CORRELATED): its Jacobian is not diagonal, so signs alone do not give its trace."""
    noisy = n.alpha**2 * CORRELATED + n.sigma**2 * torch.eye(2, dtype=torch.float64)
    x0 = x @ (n.alpha * torch.linalg.solve(noisy, CORRELATED))
    return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)


def test_hutchinson_scatters_about_the_exact_density() -> None:
    """Of many probes the mean is the exact one within three standard errors; a single one is not."""
    x = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    want = torch.distributions.MultivariateNormal(torch.zeros(2).double(), CORRELATED).log_prob(x)
    exact = log_density(correlated, x, Flow(), rtol=1e-6, atol=1e-6)
    assert (exact - want).abs().max() < 1e-3
    rng = torch.Generator().manual_seed(0)
    many = log_density(correlated, x.expand(400, 2), Flow(), rtol=1e-4, atol=1e-4, rng=rng)
    assert many.std() > 0.1
    assert (many.mean() - want).abs() < 3 * many.std() / 20
    again = log_density(
        correlated, x.expand(400, 2), Flow(), rtol=1e-4, atol=1e-4, rng=torch.Generator().manual_seed(0)
    )
    assert torch.equal(again, many)


# ODEs as layers


class Field(torch.nn.Module):
    """A small bent field of (s, y), y [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.into = torch.nn.Parameter(torch.randn(3, 16, generator=rng, dtype=torch.float64))
        self.out = torch.nn.Parameter(torch.randn(16, 2, generator=rng, dtype=torch.float64) / 4)
        self.idle = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))  # f does not read it

    def forward(self, s: float, y: Tensor) -> Tensor:
        return torch.tanh(torch.cat([y, torch.full_like(y[:, :1], s)], 1) @ self.into) @ self.out


@pytest.mark.system("neural-ode")
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
def test_dopri5_meets_rtol_on_a_linear_ode(rtol: float) -> None:
    """A spiral: y(s) = exp(s M) y(0), forwards and backwards."""
    m = torch.tensor([[-0.5, 4.0], [-4.0, -0.5]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.3], [-0.2, 2.0]], dtype=torch.float64)
    for start, stop in ((0.0, 2.0), (2.0, 0.0)):
        got = flow(lambda s, y: y @ m.T, y, start, stop, rtol=rtol, atol=rtol)
        want = y @ torch.linalg.matrix_exp((stop - start) * m).T
        assert (got - want).norm() <= 10 * rtol * (want.norm() + 1)


@pytest.mark.system("neural-ode")
def test_adjoint_gradients_are_backpropagations() -> None:
    """To 1e-4 of their size (here 1e-6), of the start, of every parameter, and zero of one that is not read."""
    f, y = (
        Field(),
        torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True),
    )
    wanted = [y, *f.parameters()]

    def grads(end: Tensor) -> tuple[Tensor, ...]:
        loss = (end.square() * torch.linspace(1, 2, 7).double()[:, None]).sum()
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    ours = grads(flow(f, y, 0.0, 1.5, tuple(f.parameters()), 1e-7, 1e-7))
    theirs = grads(integrate(f, y, 0.0, 1.5, 1e-7, 1e-7))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp_min(1e-6)
    assert torch.equal(ours[-1], torch.zeros(3).double())


@pytest.mark.system("neural-ode")
def test_the_adjoint_keeps_only_the_end_and_the_parameters() -> None:
    """What autograd holds for the way back: as many numbers at ten times the calls; by backpropagation many more."""

    def held(run: Callable[..., Tensor], tol: float, *more: object) -> int:
        sizes: list[int] = []

        def pack(saved: Tensor) -> Tensor:
            sizes.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            run(f, y, 0.0, 1.5, *more, rtol=tol, atol=tol)
        return sum(sizes)

    f, y = (
        Field(),
        torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True),
    )
    params = tuple(f.parameters())
    assert held(flow, 1e-3, params) == held(flow, 1e-9, params) == y.numel() + sum(p.numel() for p in params)
    assert held(integrate, 1e-9) > 3 * held(integrate, 1e-3) > 30 * held(flow, 1e-3, params)


@pytest.mark.system("neural-ode")
def test_a_continuous_flows_density_integrates_to_one() -> None:
    """A normal law carried by a bent field: exp(log p(y at 1)), from y at 1 back to the normal, over the plane."""
    side = torch.linspace(-8, 8, 81, dtype=torch.float64)
    plane = torch.cartesian_prod(side, side)
    f = Field()
    base, risen = transported(f, plane, 1.0, 0.0, 1e-5, 1e-5)
    log_p = -(base.square() + math.log(2 * math.pi)).sum(1) / 2 + risen
    assert abs(log_p.exp().sum().item() * 0.2**2 - 1) < 1e-4
    still = -(plane.square() + math.log(2 * math.pi)).sum(1) / 2
    assert (log_p.exp() - still.exp()).abs().max() > 0.01  # the field does carry it elsewhere


# what goes wrong


@pytest.mark.parametrize(
    "settings", [{"rtol": 0.0}, {"atol": 0.0}, {"rtol": -1e-3}, {"atol": -1.0}, {"atol": math.nan}]
)
def test_tolerances_are_above_zero(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="tolerances must be above 0, got rtol = "):
        solve(rk45.given(**settings), Gaussian().denoise, X, at(Flow(), [1.0, 0.0]))
    with pytest.raises(ValueError, match="smallest must be above 0"):
        log_density(Gaussian().denoise, X[:, None], Flow(), smallest=0.0)


def test_a_grid_of_nodes_alone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"make the grid with grid.at\(path, times\)"):
        solve(rk45, Gaussian().denoise, X, Grid(at(Flow(), [1.0, 0.0]).nodes))


def test_slopes_that_are_no_numbers_end_it() -> None:
    with pytest.raises(ValueError, match=r"no step from 0 meets rtol = .* slopes jump, or are NaN"):
        integrate(lambda s, y: y * math.nan, X, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"no step from .* slopes jump"):
        integrate(lambda s, y: 1 / (0.5 - s) ** 2 * torch.ones_like(y), X, 0.0, 1.0)


def test_a_pipeline_refuses_it_in_one_line() -> None:
    pipe = next(f for f in FAMILIES if f.name == "sd3").build()
    with pytest.raises(RecipeError, match="rk45 chooses its times while it runs, and a pipeline must know") as error:
        hasten.accelerate(pipe, Recipe.from_dict({"solver": "rk45"}))
    assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match="rtol"):
        Recipe.from_dict({"solver": {"rk45": {"rtol": 0}}})
