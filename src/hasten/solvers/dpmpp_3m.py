"""DPM-Solver++(3M), the multistep solver in x0 of third order."""

from __future__ import annotations

from math import isinf

import torch
from torch import Tensor

from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver
from hasten.solvers.exponential import weights


@solver(order=3, systems=("dpm-solver-pp",))
def dpmpp_3m(x: Tensor, grid: Grid) -> Steps:
    """Third order, one call a step, from the last three x0: the exact integral of the parabola through them, on any
    spacing. Lu et al. 2022, arXiv:2211.01095 sec. 4.

    Two things that the authors' code leaves at second order: their D2 is half of the second derivative that it stands
    for; and the first step, of first order, is mended as soon as the x0 at its end is known, by the trapezoid between
    both ends. A step into the last one before a clean end is of second order, and the last of first; a step from pure
    noise is mended in alpha / sigma, and its start then left out.
    """
    seen: list[tuple[Node, Tensor]] = []  # the newest first
    for left, (now, after) in zip(range(len(grid), 0, -1), grid.steps(), strict=False):
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        state, x0 = p.x, p.x0
        if now is grid.nodes[1]:
            then, x0_then = seen[0]
            rise = now.alpha - then.alpha * now.sigma / then.sigma
            state = state + rise / 2 * (x0 - x0_then)
            seen = [] if isinf(then.lam) else seen
        seen = [(now, x0), *seen[: min(3, left) - 1 if grid.nodes[-1].clean else 2]]
        x = torch.mul(state, after.sigma / now.sigma)
        for w, (_, seen_x0) in zip(weights(now, after, [n for n, _ in seen]), seen, strict=True):
            x.add_(seen_x0, alpha=w)
    return x
