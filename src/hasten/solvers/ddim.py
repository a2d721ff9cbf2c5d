"""DDIM, the deterministic sampler that is exact where the prediction does not change."""

from __future__ import annotations

from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=1, systems=("ddim",))
def ddim(x: Tensor, grid: Grid) -> Steps:
    """First order, one call a step: keep x0 and eps, change their shares. Song et al. 2020, arXiv:2010.02502 eq. 12,
    eta = 0.

    On the straight path it is Euler's method on the velocity (rectified flow's sampler).
    """
    for now, after in grid.steps():
        p = yield x, now
        x = p.mix(x0=after.alpha, eps=after.sigma)
    return x
