"""UniPC: a predictor, and a corrector that uses the call of the next step, so it costs none."""

from __future__ import annotations

from math import expm1, isinf

from torch import Tensor

from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver


@solver(order=3, systems=("unipc",))
def unipc(x: Tensor, grid: Grid) -> Steps:
    """Third order, one call a step: UniPC-2 in x0 with B(h) = e^h - 1. Zhao et al. 2023, arXiv:2302.04867 alg. 5-8.

    Predictor of order two from the last two x0, then, once the network has been asked at the predicted state, a corrector of
    order three from the same two and the new one. First order from pure noise, where h is infinite. An edit of the latents
    between steps is added to the corrected state.
    """
    before: tuple[Node, Tensor] | None = None
    base: tuple[Tensor, Node, Tensor] | None = None  # state, node and x0 that the last step started from
    for now, after in grid.steps():
        p = yield x, now
        state = p.x
        if base is not None and not isinf(base[1].lam):
            state = p.x + _corrected(*base, before, now, p.x0) - x
        if after.clean:
            return after.alpha * p.x0
        ahead = _first_order(state, now, after, p.x0)
        if base is not None and not isinf(base[1].lam):
            h, back = after.lam - now.lam, base[1].lam - now.lam
            ahead = ahead - after.alpha * expm1(-h) / 2 * h / back * (base[2] - p.x0)
        before = None if base is None else (base[1], base[2])
        base, x = (state, now, p.x0), ahead
    return x


def _first_order(x: Tensor, now: Node, after: Node, x0: Tensor) -> Tensor:
    """Exact where x0 does not change: eq. 3 of the paper with one term."""
    return after.sigma / now.sigma * x - after.alpha * expm1(-(after.lam - now.lam)) * x0


def _corrected(
    x: Tensor, then: Node, x0_then: Tensor, before: tuple[Node, Tensor] | None, now: Node, x0_now: Tensor
) -> Tensor:
    """UniC from `then` to `now`: eq. 5 with the points before, then and now; without `before`, with two."""
    h = now.lam - then.lam
    rise = expm1(-h)
    state = _first_order(x, then, now, x0_then)
    if before is None or isinf(before[0].lam):
        return state - now.alpha * rise / 2 * (x0_now - x0_then)
    r = (before[0].lam - then.lam) / h
    # sum_k rho_k r_k^(n-1) = n! phi_(n+1)(-h) / B(h) for n = 1, 2 with r_2 = 1; B(h) = e^-h - 1
    phi_2 = rise / -h - 1
    b_1, b_2 = phi_2 / rise, 2 * (phi_2 / -h - 1 / 2) / rise
    rho_1 = (b_1 - b_2) / (1 - r)
    rho_2 = b_1 - rho_1
    slope = (before[1] - x0_then) / r
    return state - now.alpha * rise * (rho_1 * slope + rho_2 * (x0_now - x0_then))
