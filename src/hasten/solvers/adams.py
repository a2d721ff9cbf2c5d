"""What linear multistep methods share: two variables in which the ODE has nothing but a prediction on its right, means
of polynomials through the last ones, and a start that does not spoil the order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from math import inf, isfinite

import numpy as np
from torch import Tensor

from hasten.denoiser import Prediction
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps

Point = tuple[Prediction, Node]

GAUSS = tuple(zip(*(v.tolist() for v in np.polynomial.legendre.leggauss(8)), strict=True))
"""(point, weight) on [-1, 1]."""


def gauss(start: float, stop: float) -> list[float]:
    """The points of Gauss's quadrature between."""
    return [(start + stop + (stop - start) * point) / 2 for point, _ in GAUSS]


def means(through: Sequence[float], inside: Sequence[float]) -> list[float]:
    """Of each of Lagrange's polynomials through these points the mean over a step, by its values at `inside`: where the
    points of `gauss` lie in the polynomials' variable. They sum to one."""
    found = []
    for k, here in enumerate(through):
        others = [*through[:k], *through[k + 1 :]]
        mean = 0.0
        for u, (_, weight) in zip(inside, GAUSS, strict=True):
            for other in others:
                weight *= (u - other) / (here - other)
            mean += weight / 2
        found.append(mean)
    return found


def ratio(n: Node) -> float:
    """sigma / alpha, infinite at pure noise."""
    return n.sigma / n.alpha if n.alpha else inf


def transfer(
    p: Prediction, now: Node, after: Node, eps: Sequence[Tensor] = (), shares: Sequence[float] = (1.0,)
) -> Tensor:
    """The state of `p` moved to `after` with the sum of these shares of `eps`, the first of which is p's own: phi of
    Liu et al. 2022, arXiv:2202.09778 (eq. 9), which solves d(x / alpha) = eps d(sigma / alpha) for an eps that stays.
    [B, ...], a new tensor.

    It is DDIM's step and what the others differ by, so that a single eps needs no division by alpha.
    """
    if len(shares) == 1:
        return p.mix(x0=after.alpha, eps=after.sigma)
    gain = after.sigma - now.sigma * after.alpha / now.alpha
    x = p.mix(x0=after.alpha, eps=after.sigma + gain * (shares[0] - 1))
    for e, share in zip(eps[1:], shares[1:], strict=True):
        x.add_(e, alpha=gain * share)
    return x


def straight(points: Sequence[Point], after: Node) -> Tensor:
    """From the state at the first point to `after`, with a polynomial through what was seen at all of them; [B, ...].

    Every path is the straight one but for its scale: with u = sigma / (alpha + sigma), x / (alpha + sigma) is
    (1 - u) x0 + u eps, and moves by (eps - x0) du. Neither end of it is singular.
    """
    p, now = points[0]
    us = [n.sigma / (n.alpha + n.sigma) for _, n in points]
    scale = after.alpha + after.sigma
    end = after.sigma / scale
    gains = [scale * (end - us[0]) * share for share in means(us, gauss(us[0], end))]
    x = p.mix(x0=-gains[0], eps=gains[0], x=scale / (now.alpha + now.sigma))
    for (q, _), gain in zip(points[1:], gains[1:], strict=True):
        x.add_(q.mix(x0=-gain, eps=gain))
    return x


def settled(
    p: Prediction, x: Tensor, now: Node, start: list[Point], order: int
) -> Generator[tuple[Tensor, Node], Prediction, Prediction]:
    """What holds at `now`, where `x` was asked and `p` answered, once the steps from `start` are made anew with it.

    A first step knows one prediction, and its error of h^2 would stay: order two at most. The polynomial through both
    of its ends makes it one of h^3 and costs no call: order three. But what was seen is that of a state h^2 away, too
    much for order four, which therefore asks once more, and makes the second step anew in the same way.
    """
    state = straight([*start, (p, now)], now)
    if p.x is not x:
        state.add_(p.x - x)  # an edit
    if len(start) + 2 < order:
        p = yield state, now
        start.append((p, now))
    else:
        p = Prediction.of("flow", p.mix(x0=-1, eps=1), state, now)
        start.clear()
    return p


def multistep(x: Tensor, grid: Grid, order: int, corrected: bool, place: Callable[[list[float]], list[float]]) -> Steps:
    """Adams-Bashforth on eps, with the weights of the very grid: from the last `order` of them, fewer while there are
    fewer.

    Args:
        order: 1 (DDIM) to 4.
        corrected: make the start anew, as `settled` says.
        place: from values of sigma / alpha to the variable in which the polynomials are. Where that is infinite, what
            was seen is left out, and a step that ends there is DDIM's.
    """
    seen: list[Tensor] = []  # eps, the newest first
    us: list[float] = []
    start: list[Point] = []
    for now, after in grid.steps():
        p = yield x, now
        if start:
            p = yield from settled(p, x, now, start, order)
        r, end = ratio(now), ratio(after)
        u, stop, *inside = place([r, end, *(gauss(r, end) if now.alpha else ())])
        seen, us = [p.eps, *seen[: order - 1]], [u, *us[: order - 1]]
        x = transfer(p, now, after, seen, means(us, inside) if len(us) > 1 and isfinite(stop) else (1.0,))
        if corrected and order > 1 and len(us) == 1 and not start:
            start = [(p, now)]
        if not isfinite(u):
            seen, us = [], []
    return x
