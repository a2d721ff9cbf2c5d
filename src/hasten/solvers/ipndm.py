"""iPNDM, Adams-Bashforth on eps with DDIM's transfer."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@solver(order=2)
def ipndm(x: Tensor, grid: Grid) -> Steps:
    """One call a step, from the last four eps, fewer while there are fewer. Zhang & Chen 2022, arXiv:2204.13902 eq.
    16-17, after Liu et al. 2022, arXiv:2202.09778 eq. 12.

    The weights are those of a grid even in sigma / alpha, so on other grids, and after the first step's Euler, its
    order is two; its constant is small. An eps seen at pure noise is kept out of the differences: there eps is the
    state itself.
    """
    seen: list[Tensor] = []
    for now, after in grid.steps():
        p = yield x, now
        seen = [p.eps, *seen[:3]]
        weights = ADAMS_BASHFORTH[len(seen) - 1]
        eps = seen[0] * weights[0]
        for w, e in zip(weights[1:], seen[1:], strict=True):
            eps.add_(e, alpha=w)
        if now.alpha == 0:
            x, seen = p.mix(x0=after.alpha, eps=after.sigma), []
        else:
            ratio = after.alpha / now.alpha
            x = torch.mul(p.x, ratio).add_(eps, alpha=after.sigma - ratio * now.sigma)
    return x
