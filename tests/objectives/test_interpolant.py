"""Learning by the quadratic losses of stochastic interpolants gives the closed forms of Gaussians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten.objectives.pretrain.interpolant import (
    ENCODING_DECODING,
    LINEAR,
    TRIGONOMETRIC,
    Between,
    StochasticInterpolant,
)

pytestmark = pytest.mark.system("stochastic-interpolants")
each_interpolant = pytest.mark.parametrize(
    "between", [LINEAR, TRIGONOMETRIC, ENCODING_DECODING], ids=["linear", "trig", "encode"]
)
DEGREE = 7


class Affine(nn.Module):
    """p(t) + q(t) x, with Chebyshev polynomials p and q of their own in each half of the time (one interpolant has a
    corner in the middle). A loss that is quadratic in it is quadratic in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, 2 * (DEGREE + 1), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        late = (t > 0.5).double()[:, None]
        powers = torch.cos(torch.arange(DEGREE + 1) * torch.acos(4 * t[:, None] - 1 - 2 * late))
        p, q = (torch.cat([powers * (1 - late), powers * late], 1) @ self.weights.T).unbind(1)
        return p[:, None] + q[:, None] * x


def learnt(between: Between, size: int = 100_000) -> dict[str, nn.Module]:
    """The minimum of the loss over one large batch, by one Newton step from nothing."""
    rng = torch.Generator().manual_seed(0)
    x0 = -1 + 0.3**0.5 * torch.randn(size, 1, generator=rng, dtype=torch.float64)
    x1 = 2 + 0.8**0.5 * torch.randn(size, 1, generator=rng, dtype=torch.float64)
    nets = {"velocity": Affine(), "noise": Affine()}
    parameters = [n.weights for n in nets.values()]
    batch = {"x0": x0, "x1": x1}
    loss = StochasticInterpolant(between).loss(nets, batch, torch.Generator().manual_seed(1))
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(s, parameters, retain_graph=True, allow_unused=True) for s in slopes]
    bend = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
    found = -torch.linalg.lstsq(bend, slopes.detach()[:, None]).solution.reshape(2, 2, -1)
    with torch.no_grad():
        for p, w in zip(parameters, found, strict=True):
            p.copy_(w)
    return nets


@each_interpolant
def test_the_learnt_velocity_and_score_are_the_closed_forms(between: Between) -> None:
    """x0 ~ N(-1, 0.3), x1 ~ N(2, 0.8): b = m' + (alpha alpha' v0 + beta beta' v1 + gamma gamma') (x - m) / c, and
    eta = gamma (x - m) / c, c the variance at t."""
    nets = learnt(between)
    t = torch.linspace(0.1, 0.9, 33, dtype=torch.float64)
    t = t[(t - 0.5).abs() > 0.05]  # at the seam of the two polynomials both are at their worst
    (a, b, g), (da, db, dg) = between.shares(t)
    mean, drift, var = 2 * b - a, 2 * db - da, 0.3 * a**2 + 0.8 * b**2 + g**2
    for side in (-1.0, 0.0, 1.0):
        off = side * var.sqrt()
        x = (mean + off)[:, None]
        velocity = drift + (0.3 * a * da + 0.8 * b * db + g * dg) / var * off
        with torch.no_grad():
            assert (nets["velocity"](x, t)[:, 0] - velocity).abs().max() < 0.03 * velocity.abs().max()
            assert (nets["noise"](x, t)[:, 0] - g / var * off).abs().max() < 0.05


@each_interpolant
def test_it_starts_at_one_law_and_ends_at_the_other(between: Between) -> None:
    ends = torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64)
    shares = torch.stack([between.alpha(ends), between.beta(ends), between.gamma(ends)])
    assert (shares - torch.tensor([[1, 0], [0, 1], [0, 0]])).abs().max() < 2e-6


@each_interpolant
def test_slopes_are_those_of_the_shares(between: Between) -> None:
    t, h = torch.tensor([0.05, 0.3, 0.62, 0.9], dtype=torch.float64), 1e-6
    want = (between.shares(t + h)[0] - between.shares(t - h)[0]) / (2 * h)
    assert (between.shares(t)[1] - want).abs().max() < 1e-7
