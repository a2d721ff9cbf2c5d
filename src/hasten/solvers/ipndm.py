"""iPNDM, Adams-Bashforth on eps with DDIM's transfer."""

from __future__ import annotations

from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@solver(order=2)
def ipndm(x: Tensor, grid: Grid) -> Steps:
    """One call a step, from the last four eps, fewer while there are fewer. Zhang & Chen 2022, arXiv:2204.13902 eq. 16-17,
    after Liu et al. 2022, arXiv:2202.09778 eq. 12.

    The weights are those of a grid even in sigma / alpha, so on other grids, and after the first step's Euler, its order is
    two; its constant is small. An eps seen at pure noise is kept out of the differences: there eps is the state itself.
    """
    seen: list[Tensor] = []
    for now, after in grid.steps():
        p = yield x, now
        seen = [p.eps, *seen[:3]]
        eps = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(seen) - 1], seen, strict=True))
        if now.alpha == 0:
            x, seen = after.alpha * p.x0 + after.sigma * p.eps, []
        else:
            x = after.alpha / now.alpha * (p.x - now.sigma * eps) + after.sigma * eps
    return x
