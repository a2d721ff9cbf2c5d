"""iPNDM, Adams-Bashforth on eps with DDIM's transfer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.adams import transfer
from hasten.solvers.declare import Steps, solver

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@solver(order=lambda order, **_: min(order, 2))
def ipndm(x: Tensor, grid: Grid, *, order: Annotated[int, Field(ge=1, le=4)] = 4) -> Steps:
    """One call a step, from the last `order` eps, fewer while there are fewer. The iPNDM of Zhang &
    Chen 2022, arXiv:2204.13902, after Liu et al. 2022, arXiv:2202.09778 eq. 12.

    The weights are those of a grid even in sigma / alpha, so on other grids, and after the first step's Euler, its
    order is two; its constant is small. With the weights of the very grid it is `lms`. An eps seen at pure noise is
    kept out of the differences: there eps is the state itself.

    Args:
        order: the eps that a step looks back on; 1 is DDIM.
    """
    seen: list[Tensor] = []
    for now, after in grid.steps():
        p = yield x, now
        seen = [p.eps, *seen[: order - 1]]
        x = transfer(p, now, after, seen, ADAMS_BASHFORTH[len(seen) - 1])
        if now.alpha == 0:
            seen = []
    return x
