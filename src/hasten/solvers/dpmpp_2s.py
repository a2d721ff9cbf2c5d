"""DPM-Solver++(2S), single steps in x0."""

from __future__ import annotations

from math import expm1
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver
from hasten.solvers.exponential import inside


@solver(order=2, calls=2, systems=("dpm-solver-pp",))
def dpmpp_2s(x: Tensor, grid: Grid, *, r1: Annotated[float, Field(ge=0.1, le=0.9)] = 0.5) -> Steps:
    """Second order, two calls a step, one in the last, which ends clean. Lu et al. 2022, arXiv:2211.01095 alg. 1.

    A step from pure noise, where lam is infinite, asks for the second time at that share of alpha / sigma: there the
    rule is the midpoint's.

    Args:
        r1: where in the step, in lam, the second call is.
    """
    for (now, after), between in zip(grid.steps(), inside(grid, r1), strict=True):
        p = yield x, now
        if between is None:
            return p.mix(x0=after.alpha)
        q = yield p.mix(x0=between.alpha, eps=between.sigma), between
        rise = -after.alpha * expm1(now.lam - after.lam)
        x = p.mix(x0=rise * (1 - 1 / (2 * r1)), x=after.sigma / now.sigma).add_(q.mix(x0=rise / (2 * r1)))
    return x
