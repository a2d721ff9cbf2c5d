"""Energy guidance: the exact posterior where the score is the likelihood, of the state and of x0; autoguidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from glyphs import PIXELS, Digits
from torch import Tensor

from hasten.grid import Node, at, build
from hasten.grids.uniform import uniform
from hasten.guidance.autoguidance import autoguidance
from hasten.guidance.energy import energy
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian
from hasten.solvers.ddim import ddim
from hasten.solvers.drive import solve

PRIOR, SEEN, TAU = Gaussian(0.7, 0.25), -0.4, 0.3
POSTERIOR_VAR = 1 / (1 / PRIOR.var + 1 / TAU**2)
POSTERIOR = Gaussian(POSTERIOR_VAR * (PRIOR.mean / PRIOR.var + SEEN / TAU**2), POSTERIOR_VAR)
PATHS = [pytest.param(p, id=type(p).__name__) for p in (Flow(), EDM(8.0), Preserving())]


def likelihood_of_x0(x0: Tensor, node: Node) -> Tensor:
    """log p(y | x_t) of y = x0 + tau noise, up to a constant, given E[x0 | x_t]: what is left unknown of x0 adds to
    tau."""
    left = PRIOR.var * node.sigma**2 / (PRIOR.var * node.alpha**2 + node.sigma**2)
    return -((SEEN - x0) ** 2).sum(-1) / (2 * (TAU**2 + left))


def likelihood_of_x(x: Tensor, node: Node) -> Tensor:
    return likelihood_of_x0(PRIOR.denoise(x, node).x0, node)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("of", ["x", "x0"])
def test_the_score_of_a_measurement_gives_the_denoiser_of_the_posterior(of: Any, path: Any) -> None:
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(4, 3)
    guided = energy(PRIOR.denoise, likelihood_of_x if of == "x" else likelihood_of_x0, of=of)
    for node in at(path, [0.9, 0.5, 0.2, 0.05]).nodes:
        got, want = guided(x, node), POSTERIOR.denoise(x, node)
        assert torch.allclose(got.x0, want.x0, atol=1e-9)
        assert torch.allclose(got.eps, want.eps, atol=1e-9)


def test_any_score_of_clean_pictures_steers_also_in_inference_mode() -> None:
    """Brightness as a score, through the denoiser: digits get brighter with the scale."""
    law, grid = Digits(0.1), build(Flow(), uniform, 16)
    x = torch.randn(200, PIXELS, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        drawn = [
            solve(ddim, energy(law.denoise(), lambda x0, n: x0.mean(-1), scale=s, of="x0"), x, grid)
            for s in (0.0, 5.0, 20.0)
        ]
    light = [float(y.mean()) for y in drawn]
    assert light[0] + 0.1 < light[1] < light[2] - 0.1


def test_at_pure_noise_nothing_is_added() -> None:
    node, x = at(Flow(), [1.0, 0.0]).nodes[0], torch.ones(2, 3)
    assert torch.equal(energy(PRIOR.denoise, likelihood_of_x)(x, node).x0, PRIOR.denoise(x, node).x0)


@pytest.mark.parametrize(
    ("score", "said"),
    [(lambda x, n: x.sum(), "one number a row, \\[2\\]; this one gave \\[\\]"),
     (lambda x, n: x.detach().sum(-1), "no gradient")],
)  # fmt: skip
def test_scores_that_cannot_steer_are_told(score: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        energy(PRIOR.denoise, score)(torch.ones(2, 3), at(Flow(), [0.5, 0.0]).nodes[0])


@pytest.mark.parametrize("path", PATHS)
def test_autoguidance_undoes_an_error_that_a_worse_network_makes_threefold(path: Any) -> None:
    """The paper's reason, exactly: where the worse errs three times as far in one direction, scale 1.5 is right."""
    true, main, worse = Gaussian(0.7), Gaussian(0.7 + 0.2), Gaussian(0.7 + 0.6)
    x = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(4, 3)
    for node in at(path, [0.9, 0.5, 0.05]).nodes:
        got = autoguidance(main.denoise, worse.denoise, scale=1.5)(x, node)
        assert torch.allclose(got.x0, true.denoise(x, node).x0, atol=1e-10)
