"""DPM-Solver, single steps in eps."""

from __future__ import annotations

from math import expm1
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.denoiser import Prediction
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver
from hasten.solvers.exponential import inside

R2 = 2 / 3
"""Where DPM-Solver-3 asks last: elsewhere its order is two, because the last stage's weight must be 1 / (2 r2) for the
order two and 1 / (3 r2^2) for three."""


@solver(order=lambda order, **_: order, calls=lambda order, **_: order, systems=("dpm-solver",))
def dpm_solver(
    x: Tensor, grid: Grid, *,
    order: Annotated[int, Field(ge=1, le=3)] = 2,
    r1: Annotated[float | None, Field(gt=0, lt=1)] = None,
) -> Steps:  # fmt: skip
    """As many calls a step as its order, one in the last, which ends clean. Lu et al. 2022, arXiv:2206.00927 alg. 1 and
    2, with eq. 3.7 for order one (DDIM).

    From pure noise, where lam is infinite, the step is the same Runge-Kutta method in alpha / sigma, in which the ODE
    is d(x / sigma) = x0 d(alpha / sigma).

    Args:
        order: of DPM-Solver-1, -2 or -3.
        r1: where in the step, in lam, the second call is; None is the paper's, 1 / 2 of order two and 1 / 3 of three.
    """
    r1 = r1 or (1 / 2 if order == 2 else 1 / 3)
    nowhere = [None] * len(grid)
    firsts, seconds = (inside(grid, r) if order >= asked else nowhere for r, asked in ((r1, 2), (R2, 3)))
    for (now, after), first, second in zip(grid.steps(), firsts, seconds, strict=True):
        p = yield x, now
        x = p.mix(x0=after.alpha, eps=after.sigma)
        if first is None:
            continue
        q = yield p.mix(x0=first.alpha, eps=first.sigma), first
        if second is None:
            x = _along(p, q, now, after, _rise(now, after)[0] / (2 * r1))
        else:
            q = yield _along(p, q, now, second, _rise(now, second)[1] * R2 / r1), second
            x = _along(p, q, now, after, _rise(now, after)[1] / R2)
    return x


def _rise(now: Node, after: Node) -> tuple[float, float]:
    """(e^h - 1, (e^h - 1) / h - 1), the integrals of the kernel times 1 and s / h; from pure noise, where the kernel is
    even in alpha / sigma, (1, 1 / 2)."""
    if now.alpha == 0:
        return 1.0, 0.5
    h = after.lam - now.lam
    return expm1(h), expm1(h) / h - 1


def _along(p: Prediction, q: Prediction, now: Node, after: Node, bend: float) -> Tensor:
    """The state at `after` where eps (from pure noise x0) is that of p, and `bend` is the integral of what q differs by
    from it."""
    straight = _rise(now, after)[0] - bend
    if now.alpha == 0:
        x = p.mix(x0=after.alpha * straight, x=after.sigma / now.sigma)
        return x.add_(q.mix(x0=after.alpha * bend))
    return p.mix(eps=-after.sigma * straight, x=after.alpha / now.alpha).add_(q.mix(eps=-after.sigma * bend))
