"""UniPC: a predictor, and a corrector that uses the call of the next step, so it costs none."""

from __future__ import annotations

from math import expm1, isinf

import torch
from torch import Tensor

from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver


@solver(order=3, systems=("unipc",))
def unipc(x: Tensor, grid: Grid) -> Steps:
    """Third order, one call a step: UniPC-2 in x0 with B(h) = e^h - 1. Zhao et al. 2023, arXiv:2302.04867 alg. 5-8.

    Predictor of order two from the last two x0, then, once the network has been asked at the predicted state, a
    corrector of order three from the same two and the new one. First order from pure noise, where h is infinite. An
    edit of the latents between steps is added to the corrected state.
    """
    before: tuple[Node, Tensor] | None = None
    base: tuple[Tensor, Node, Tensor] | None = None  # state, node and x0 that the last step started from
    for now, after in grid.steps():
        p = yield x, now
        x0, state = p.x0, p.x
        if base is not None and not isinf(base[1].lam):
            corrected = _corrected(*base, before, now, x0)
            state = corrected if p.x is x else corrected + (p.x - x)
        if after.clean:
            return after.alpha * x0
        gain, rise = after.sigma / now.sigma, -after.alpha * expm1(now.lam - after.lam)
        if base is None or isinf(base[1].lam):
            ahead = torch.mul(state, gain).add_(x0, alpha=rise)
        else:
            r = (after.lam - now.lam) / (now.lam - base[1].lam) / 2  # x0 + r (x0 - x0_then): half a step ahead
            ahead = torch.mul(state, gain).add_(x0, alpha=rise * (1 + r)).sub_(base[2], alpha=rise * r)
        before = None if base is None else (base[1], base[2])
        base, x = (state, now, x0), ahead
    return x


def _corrected(
    x: Tensor, then: Node, x0_then: Tensor, before: tuple[Node, Tensor] | None, now: Node, x0_now: Tensor
) -> Tensor:
    """UniC from `then` to `now`: eq. 5 with the points before, then and now; without `before`, with two."""
    h = now.lam - then.lam
    rise = expm1(-h)
    pull = -now.alpha * rise  # of x0, were it constant: eq. 3
    if before is None or isinf(before[0].lam):
        rho_1, rho_2, r = 0.0, 1 / 2, 1.0
    else:
        r = (before[0].lam - then.lam) / h
        # sum_k rho_k r_k^(n-1) = n! phi_(n+1)(-h) / B(h) for n = 1, 2 with r_2 = 1; B(h) = e^-h - 1
        phi_2 = rise / -h - 1
        b_1, b_2 = phi_2 / rise, 2 * (phi_2 / -h - 1 / 2) / rise
        rho_1 = (b_1 - b_2) / (1 - r)
        rho_2 = b_1 - rho_1
    # x sigma' / sigma + pull (x0_then + rho_1 (x0_before - x0_then) / r + rho_2 (x0_now - x0_then))
    state = torch.mul(x, now.sigma / then.sigma).add_(x0_then, alpha=pull * (1 - rho_1 / r - rho_2))
    state.add_(x0_now, alpha=pull * rho_2)
    return state if rho_1 == 0 or before is None else state.add_(before[1], alpha=pull * rho_1 / r)
