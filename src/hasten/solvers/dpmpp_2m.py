"""DPM-Solver++(2M), the multistep solver in x0."""

from __future__ import annotations

from math import expm1

from torch import Tensor

from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver


@solver(order=2, systems=("dpm-solver-pp",))
def dpmpp_2m(x: Tensor, grid: Grid) -> Steps:
    """Second order, one call a step, from the last two x0. Lu et al. 2022, arXiv:2211.01095 alg. 2.

    The first step is of first order, and so is one from pure noise (its h is infinite) and the last, which ends clean.
    """
    before: tuple[Node, Tensor] | None = None
    for now, after in grid.steps():
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        h = after.lam - now.lam
        rise = -after.alpha * expm1(-h)
        if before is None:
            x = p.mix(x0=rise, x=after.sigma / now.sigma)
        else:
            then, x0_then = before
            r = h / (2 * (now.lam - then.lam))  # x0 + r (x0 - x0_then) is the slope's x0
            x = p.mix(x0=rise * (1 + r), x=after.sigma / now.sigma).sub_(x0_then, alpha=rise * r)
        before = now, p.x0
    return x
