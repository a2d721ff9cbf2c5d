"""Any diffusion has the flow's marginals, the noise refines one Brownian path, and level 0 is Euler."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.brownian import Brownian
from hasten.denoiser import Prediction
from hasten.grid import Node, at
from hasten.objectives.pretrain.interpolant import ENCODING_DECODING, LINEAR, TRIGONOMETRIC, Between
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.gvp import GVP
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve
from hasten.solvers.interpolant_sde import interpolant_sde

pytestmark = pytest.mark.system("stochastic-interpolants")
PATHS = [Flow(), EDM(5.0), Preserving()]
CHOICES = [(0.5, "sigma"), (2.0, "sigma"), (2.0, "ends")]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def moments(x: Tensor) -> Tensor:
    return torch.stack([x.mean(), x.var(), ((x - x.mean()) ** 3).mean()])


@each_path
def test_level_0_is_euler_to_the_last_bit(path: Path) -> None:
    grid, x = at(path, [0.9, 0.7, 0.4, 0.2, 0.0]), torch.linspace(-2, 2, 9, dtype=torch.float64)
    want = solve(tree.function("solvers", "euler"), Mixture().denoise, x, grid)
    got = solve(interpolant_sde.given(level=0.0), Mixture().denoise, x, grid, Brownian([0]))
    assert torch.equal(got, want)


@pytest.mark.parametrize(("form", "diffusion"), [("sigma", lambda n: n.sigma), ("ends", lambda n: n.alpha * n.sigma)])
def test_a_step_adds_the_noise_of_its_diffusion(form: str, diffusion: Callable[[Node], float]) -> None:
    """Variance 2 epsilon h, epsilon the level times its form at the step's start; none from pure noise with "ends"."""
    x = torch.zeros(20_000, dtype=torch.float64)
    for times in ([1.0, 0.8], [0.6, 0.5]):
        grid = at(GVP(), times)
        run = interpolant_sde.given(level=1.5, form=form)
        got = solve(run, lambda x, n: Prediction(x, x, x), x, grid, Brownian([4], skeleton=0))
        want = 2 * 1.5 * diffusion(grid.nodes[0]) * (times[0] - times[1])
        assert float(got.var()) == pytest.approx(want, rel=0.05)


@each_path
@pytest.mark.parametrize("law", [Gaussian(), Mixture()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(("level", "form"), CHOICES[1:])
def test_strong_order_one_along_one_brownian_path(path: Path, law: Gaussian | Mixture, level: float, form: str) -> None:
    """Its noise is additive, for which Euler-Maruyama has strong order one (Kloeden & Platen 1992, sec. 10.2)."""
    x, noise = torch.linspace(-2, 2, 40, dtype=torch.float64), Brownian([3], skeleton=9)
    run = interpolant_sde.given(level=level, form=form)
    ends = []
    for steps in (16, 128, 1024):
        grid = at(path, torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64).tolist())
        ends.append(solve(run, law.denoise, x, grid, noise))
    coarse, fine = ((e - ends[-1]).square().mean().sqrt() for e in ends[:-1])
    assert abs(float(torch.log2(coarse / fine)) / 3 - 1) < 0.2


@each_path
@pytest.mark.parametrize(("level", "form"), CHOICES)
def test_every_diffusion_has_the_marginals_of_the_flow(path: Path, level: float, form: str) -> None:
    """Started in the law of x_t, a mixture, at t = 0.9 and run to 0.1: its law there."""
    law, rng = Mixture(), torch.Generator().manual_seed(1)
    grid = at(path, torch.linspace(0.9, 0.1, 81, dtype=torch.float64).tolist())
    first, last = grid.nodes[0], grid.nodes[-1]
    size = 12_000
    x0, z = law.sample(size, rng).double(), torch.randn(2, size, generator=rng, dtype=torch.float64)
    x = first.alpha * x0 + first.sigma * z[0]
    got = solve(interpolant_sde.given(level=level, form=form), law.denoise, x, grid, Brownian([5], skeleton=0))
    want = last.alpha * law.sample(size, rng).double() + last.sigma * z[1]
    spread = last.alpha**2 + last.sigma**2
    scale = torch.tensor([spread**0.5, spread, spread**1.5], dtype=torch.float64)
    assert ((moments(got) - moments(want)) / scale).abs().max() < 0.06
    assert (got - solve(tree.function("solvers", "euler"), law.denoise, x, grid)).std() > 0.05 * spread**0.5


@pytest.mark.parametrize("path", [Flow(), GVP()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(("level", "form"), CHOICES)
def test_it_runs_from_pure_noise_to_clean(path: Path, level: float, form: str) -> None:
    law, rng = Gaussian(), torch.Generator().manual_seed(2)
    x = torch.randn(20_000, generator=rng, dtype=torch.float64)
    grid = at(path, torch.linspace(1, 0, 101, dtype=torch.float64).tolist())
    got = solve(interpolant_sde.given(level=level, form=form), law.denoise, x, grid, Brownian([6], skeleton=0))
    assert abs(got.mean() - 0.7) < 0.015
    assert abs(got.var() - 0.25) < 0.015


def law_between(between: Between, t: float) -> tuple[float, float, float, float, float]:
    """Of x0 ~ N(-1, 0.3), x1 ~ N(2, 0.8): mean and variance of x_t, the slopes of velocity and of noise in x - mean,
    and the mean's velocity. Albergo et al. 2023, arXiv:2303.08797 appendix on Gaussians: x_t is jointly normal with
    its parts."""
    (a, b, g), (da, db, dg) = (v.tolist() for v in between.shares(torch.tensor(t, dtype=torch.float64)))
    var = 0.3 * a * a + 0.8 * b * b + g * g
    return 2 * b - a, var, (0.3 * a * da + 0.8 * b * db + g * dg) / var, g / var, 2 * db - da


@pytest.mark.parametrize("between", [LINEAR, TRIGONOMETRIC, ENCODING_DECODING], ids=["linear", "trig", "encode"])
@pytest.mark.parametrize("level", [0.0, 0.5, 2.0])
def test_two_sided_interpolants_keep_their_marginals(between: Between, level: float) -> None:
    """From one Gaussian to another. Solvers in time read dx/dt = alpha' x0 + sigma' eps and eps alone, so a velocity b
    and a noise eta are served as the reading whose eps is eta and whose alpha' x0 + sigma' eps is b."""

    class Carrier:
        def alpha(self, t: Tensor) -> Tensor:
            return 1 - t

        def sigma(self, t: Tensor) -> Tensor:
            return between.gamma(t)

        def time(self, lam: Tensor) -> Tensor:
            raise NotImplementedError

    def denoise(x: Tensor, n: Node) -> Prediction:
        mean, _, slope, share, drift = law_between(between, n.t)
        b, eta = drift + slope * (x - mean), share * (x - mean)
        return Prediction(x, n.dsigma * eta - b, eta)

    grid = at(Carrier(), torch.linspace(0.98, 0.02, 121, dtype=torch.float64).tolist())
    (mean, var, *_), (end_mean, end_var, *_) = law_between(between, 0.98), law_between(between, 0.02)
    x = mean + math.sqrt(var) * torch.randn(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got = solve(interpolant_sde.given(level=level), denoise, x, grid, Brownian([7], skeleton=0))
    assert abs(got.mean() - end_mean) < 0.02
    assert abs(got.var() / end_var - 1) < 0.04
