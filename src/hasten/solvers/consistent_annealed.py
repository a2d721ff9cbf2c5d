"""Consistent annealed sampling: Langevin's step with the noise that lands on the next level."""

from __future__ import annotations

from math import exp, sqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=0, stochastic=True, systems=("consistent-annealed-sampling",))
def consistent_annealed(
    x: Tensor, grid: Grid, noise: Noise, *, eta: Annotated[float, Field(ge=0, le=1)] = 0.5
) -> Steps:
    """One call a step; were x0 right, the noise of every state would be its level's exactly. Jolicoeur-Martineau et al.
    2020, arXiv:2009.05475; the step that ends clean is its final denoising.

    On x / alpha, of noise s = sigma / alpha, it is x + eta s^2 score + sqrt(s'^2 - (1 - eta)^2 s^2) z, so of the old
    noise the share k = (1 - eta) s / s' of the new level stays: x' = alpha' x0 + sigma' (k eps + sqrt(1 - k^2) z). A
    step that falls further than eta takes off needs a larger eta (the paper forbids it): there k = 1, which is DDIM. At
    eta = 1 all noise is new.

    Args:
        eta: epsilon / sigma_L^2, the share of the noise that a step takes off; from 0 (DDIM) to 1 (all).
    """
    for now, after in grid.steps():
        p = yield x, now
        keep = min(1.0, (1 - eta) * exp(min(after.lam - now.lam, 700.0)))  # from pure noise the exponent is infinite
        x = p.mix(x0=after.alpha, eps=after.sigma * keep)
        if keep < 1 and not after.clean:
            z = noise(exp(2 * now.lam), exp(2 * after.lam), x)
            x.add_(z, alpha=after.sigma * sqrt(1 - keep**2))
    return x
