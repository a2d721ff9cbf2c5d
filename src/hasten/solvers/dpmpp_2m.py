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
            return after.alpha * p.x0
        h = after.lam - now.lam
        x0 = p.x0
        if before is not None:
            then, x0_then = before
            x0 = x0 + (p.x0 - x0_then) * h / (2 * (now.lam - then.lam))
        x = after.sigma / now.sigma * p.x - after.alpha * expm1(-h) * x0
        before = now, p.x0
    return x
