"""Multistep consistency sampling: to the data in one call, noise on top, and again."""

from __future__ import annotations

from math import exp, sqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=0, stochastic=True, few=True)
def consistency(x: Tensor, grid: Grid, noise: Noise, *, smallest: Annotated[float, Field(ge=0, le=1)] = 0.0) -> Steps:
    """x' = alpha' f(x, t) + noise, one call a step; f, the network's x0, is a consistency function: where the flow
    from (x, t) ends. Song et al. 2023, arXiv:2303.01469 alg. 1.

    c_skip and c_out belong to the network that it is trained as. On the straight path this is diffusers'
    FlowMatchLCM. With the exact f every step's state has its level's law, whatever the steps.

    Args:
        smallest: the paper's epsilon in sigma / alpha, the noise that f leaves in its answer (0.002 there): noise of
            variance s^2 - epsilon^2 is added at level s. 0 for an f that ends clean.
    """
    for now, after in grid.steps():
        p = yield x, now
        x = p.mix(x0=after.alpha)
        missing = after.sigma**2 - (smallest * after.alpha) ** 2
        if missing > 0:
            x.add_(noise(exp(2 * now.lam), exp(2 * after.lam), x), alpha=sqrt(missing))
    return x
