"""Euler-Maruyama and predictor-corrector: the paper's formulas written out, both ends, and the corrector's bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from affine import exact, moments
from hasten.brownian import Brownian
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve
from hasten.solvers.euler_maruyama import euler_maruyama
from hasten.solvers.predictor_corrector import predictor_corrector

PATHS = [Flow(), EDM(5.0), Preserving()]
X = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]


def told(value: object) -> str:
    return type(value).__name__


def score(x: Tensor, n: Node) -> Tensor:
    return -Mixture().denoise(x, n).eps / n.sigma


@pytest.mark.system("score-sde")
@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("path", PATHS, ids=told)
def test_euler_maruyama_is_the_reverse_sde(path: Path, tau: float) -> None:
    """dx = [f x - (1 + tau^2) / 2 g^2 score] dt + tau g dw, f = (log alpha)', g^2 = (sigma^2)' - 2 f sigma^2."""
    now, after = at(path, [0.6, 0.55]).nodes
    f = now.dalpha / now.alpha
    g = math.sqrt(2 * now.sigma * now.dsigma - 2 * f * now.sigma**2)
    z = torch.cos(X)
    want = X - 0.05 * (f * X - (1 + tau**2) / 2 * g**2 * score(X, now)) + tau * g * math.sqrt(0.05) * z
    got = solve(euler_maruyama.given(tau=tau), Mixture().denoise, X, Grid((now, after)), lambda *_: z)
    assert (got - want).abs().max() < 1e-13


@pytest.mark.system("score-sde")
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("first", [1.0, 1 - 1e-4, 0.99])
def test_euler_maruyama_is_stable_at_both_ends(first: float, tau: float) -> None:
    """g^2 is infinite at pure noise, 2e4 beside it, and a plain step there of 0.1 would multiply the noise by 1e3. Few
    steps, and last ones that halve the noise six times over."""
    law = Gaussian(0.7, 0.25)
    for times in ([first * (1 - i / 10) for i in range(11)], [first, *(0.5**i for i in range(1, 12, 2)), 0.0]):
        mean, var = moments(euler_maruyama.given(tau=tau), at(Flow(), times), law)
        assert abs(mean) < 0.05 and abs(var) < 0.2


def norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)[:, None]


@pytest.mark.system("score-sde")
@pytest.mark.parametrize("path", [EDM(5.0), Preserving()], ids=told)
def test_predictor_corrector_is_algorithm_4_and_5(path: Path) -> None:
    """Written out for an exploding and a preserving path; in alg. 5 alpha_i is taken as 1, which it is to 2%."""
    now, after = at(path, [0.6, 0.5]).nodes
    x, draws = (
        X.reshape(2, 4),
        [torch.cos(X).reshape(2, 4), torch.sin(3 * X).reshape(2, 4), torch.cos(5 * X).reshape(2, 4)],
    )
    z, *langevin = draws
    if isinstance(path, EDM):
        b = now.sigma**2 - after.sigma**2
        want = x + b * score(x, now) + math.sqrt(b) * z
    else:
        b = 1 - (now.alpha / after.alpha) ** 2
        want = (2 - math.sqrt(1 - b)) * x + b * score(x, now) + math.sqrt(b) * z
    for z in langevin:
        g = score(want, after)
        step = 2 * (0.16 * norm(z) / norm(g)) ** 2
        want = want + step * g + (2 * step).sqrt() * z
    told = iter(draws)
    solver = predictor_corrector.given(corrections=2)
    got = solve(solver, Mixture().denoise, x, Grid((now, after)), lambda *_: next(told))
    assert (got - want).abs().max() < 1e-12
    assert solver.calls == 3


@pytest.mark.system("score-sde")
def test_the_predictor_keeps_the_law_from_pure_noise() -> None:
    """There a = 0, and the formula of alg. 5 would double the variance; of one data point the step is exact."""
    mean, var = moments(predictor_corrector.given(corrections=0), at(Flow(), [1.0, 0.9]), Gaussian(0.7, 0.0))
    assert abs(mean) < 1e-15 and abs(var) < 1e-15


@pytest.mark.system("score-sde")
@pytest.mark.parametrize("snr", [0.1, 0.3])
def test_the_correctors_bias_is_snr_squared(snr: float) -> None:
    """Langevin's step of size 2 snr^2 v on a Gaussian of variance v keeps (1 - 2 snr^2)^2 of a variance and adds
    4 snr^2 v: it settles at v / (1 - snr^2), on any path."""
    law, rng = Gaussian(0.7, 0.25), torch.Generator().manual_seed(1)
    for path in PATHS:
        grid = at(path, torch.linspace(0.5, 0.49, 31, dtype=torch.float64).tolist())
        mean, var = exact(law, grid.nodes[0])
        x = mean + var**0.5 * torch.randn(2, 50_000, generator=rng)
        got = solve(predictor_corrector.given(snr=snr, corrections=2), law.denoise, x, grid, Brownian([2]))
        mean, var = exact(law, grid.nodes[-1])
        assert abs(float(got.mean()) - mean) < 0.01 * var**0.5
        assert float(got.var()) / var == pytest.approx(1 / (1 - snr**2), abs=0.02)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    grid, x = at(Flow(), [1.0, 0.6, 0.3, 0.0]), torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2))
    together = solve(predictor_corrector, Mixture().denoise, x, grid, Brownian([5, 6, 7]))
    for i, seed in enumerate([5, 6, 7]):
        alone = solve(predictor_corrector, Mixture().denoise, x[i : i + 1], grid, Brownian([seed]))
        assert torch.allclose(together[i], alone[0], atol=1e-6)


def test_a_vanishing_score_and_a_sample_of_one_element_do_no_harm() -> None:
    """The corrector's step is norms' ratio, 0 / 0 or any number there; it is at most sigma^2."""
    grid = at(Flow(), [1.0, 0.6, 0.3, 0.0])

    def nothing(x: Tensor, n: Node) -> Prediction:
        return Prediction(x, x / max(n.alpha, 1e-9), torch.zeros_like(x))

    for shape in ((), (3,), (3, 2)):
        x = torch.zeros(shape)
        assert solve(predictor_corrector, nothing, x, grid, lambda a, b, like: like).isfinite().all()
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(2))
    got = solve(predictor_corrector, Gaussian().denoise, x, at(Flow(), [1 - i / 20 for i in range(21)]), Brownian([3]))
    assert got.abs().max() < 5
