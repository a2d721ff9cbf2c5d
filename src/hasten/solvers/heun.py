"""Heun's method, the trapezoid in (alpha, sigma)."""

from __future__ import annotations

from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=2, calls=2, systems=("edm",))
def heun(x: Tensor, grid: Grid) -> Steps:
    """Second order, two calls a step (one in the last, which ends clean). Karras et al. 2022, arXiv:2206.00364 alg. 1.

    The ODE is dx = x0 d(alpha) + eps d(sigma), and both integrands are averaged over the step: on EDM's path, where
    alpha is 1, that is the algorithm to the letter; on others it needs no division by alpha or sigma, as the algorithm
    in x / alpha and sigma / alpha does, and so runs from pure noise. The first half of a step is DDIM's.
    """
    for now, after in grid.steps():
        p = yield x, now
        ahead = p.mix(x0=after.alpha, eps=after.sigma)
        if after.clean:
            return ahead
        q = yield ahead, after
        da, ds = after.alpha - now.alpha, after.sigma - now.sigma
        x = q.mix(x0=da / 2, eps=ds / 2, x=1).sub_(p.mix(x0=da / 2, eps=ds / 2))
    return x
