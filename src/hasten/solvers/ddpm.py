"""DDPM's ancestral sampling, and all that lies between it and DDIM."""

from __future__ import annotations

from math import exp, expm1, log, sqrt
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver

Variance = Literal["small", "large", "learned"]


@solver(order=1, weak=1, stochastic=True, systems=("ddpm", "iddpm", "ddim"))
def ddpm(
    x: Tensor, grid: Grid, noise: Noise, *,
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0,
    variance: Variance = "small",
) -> Steps:  # fmt: skip
    """One call a step, on any path and any grid: x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + noise, s^2 = eta^2 times
    the variance of the posterior q(x' | x, x0). Ho et al. 2020, arXiv:2006.11239 alg. 2 (eta = 1); Song et al. 2020,
    arXiv:2010.02502 eq. 12 and 16; on fewer steps, Nichol & Dhariwal 2021, arXiv:2102.09672 sec. 4.

    It is the reverse SDE with x0 held over a step. The noise is an increment on the clock (alpha / sigma)^2, so with
    eta = 1 the Ito integral of the step is met exactly. No noise falls into a clean end.

    Args:
        eta: share of the noise; 0 is DDIM exactly.
        variance: of the noise that is added: the posterior's, the one of the forward step ("sigma-hat" of DDIM's eq. 16
            and "fixedlarge" of DDPM's code), or what the network says between both.

    Raises:
        ValueError: a learned variance is asked of a network that says none.
    """
    for now, after in grid.steps():
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        fresh = -expm1(2 * (now.lam - after.lam))  # share of the posterior's variance in sigma'^2
        x = p.mix(x0=after.alpha, eps=after.sigma * sqrt(1 - eta**2 * fresh))
        if eta:
            z = noise(exp(2 * now.lam), exp(2 * after.lam), x)
            deviation = _deviation(p, now, after, fresh, variance)
            if isinstance(deviation, Tensor):
                x.addcmul_(z, deviation, value=eta)
            else:
                x.add_(z, alpha=eta * deviation)
    return x


def _deviation(p: Prediction, now: Node, after: Node, fresh: float, variance: Variance) -> float | Tensor:
    """Of the noise: sigma'^2 fresh is the posterior's variance, sigma^2 fresh that of the forward step."""
    small, large = after.sigma * sqrt(fresh), now.sigma * sqrt(fresh)
    if variance != "learned":
        return small if variance == "small" else large
    if p.spread is None:
        raise ValueError("variance = learned needs a network that says its variance: take small or large for this one")
    return torch.exp(p.spread * (log(large / small) / 2)).mul_(sqrt(large * small))  # eq. 15, v = (spread + 1) / 2
