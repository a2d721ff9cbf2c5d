"""Euler's method on the probability-flow ODE in time."""

from __future__ import annotations

from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=1, systems=("flow-matching", "rectified-flow"))
def euler(x: Tensor, grid: Grid) -> Steps:
    """First order, one call a step: x + (t' - t) dx/dt, with dx/dt = alpha' x0 + sigma' eps the velocity of the path.

    Lipman et al. 2022, arXiv:2210.02747 eq. 1; on the straight path dx/dt = eps - x0 and one step is exact where
    flows are straight (Liu et al. 2022, arXiv:2209.03003).
    """
    for now, after in grid.steps():
        p = yield x, now
        if after.clean:  # the velocity in t may be infinite there; the sample is alpha x0 whatever it is
            return p.mix(x0=after.alpha)
        h = after.t - now.t
        x = p.mix(x0=h * now.dalpha, eps=h * now.dsigma, x=1)
    return x
