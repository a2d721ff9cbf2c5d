"""Weights of exponential integrators in lam: what a polynomial through predictions adds to the state over a step."""

from __future__ import annotations

from collections.abc import Sequence
from math import expm1, isinf, log

from hasten.grid import Grid, Node


def moments(h: float, most: int) -> list[float]:
    """The integral of e^(s - h) (s / h)^n over s in [0, h], for n = 0 .. most, accurate for steps of any size.

    The exact solution in x0 is x' = (sigma' / sigma) x + alpha' int e^(s - h) x0(lam + s) ds (Lu et al. 2022,
    arXiv:2211.01095 prop. 4.1); the n-th moment is n! h phi_(n+1)(-h), with the phi of Hochbruck & Ostermann 2010, Acta
    Numerica 19. In eps the kernel is e^(h - s), and its moments are -moments(-h).
    """
    if abs(h) ** most >= 0.01:  # by parts, m_n = 1 - n / h m_(n-1), which multiplies the rounding by most! / h^most
        found = [-expm1(-h)]
        for n in range(1, most + 1):
            found.append(1 - n / h * found[-1])
        return found
    # else the series of the last, and backwards
    term = last = h / (most + 1)
    n = most + 2
    while abs(term) > 1e-17 * abs(last):
        term *= -h / n
        last += term
        n += 1
    found = [last]
    for n in range(most, 0, -1):
        found.append((1 - found[-1]) * h / n)
    return found[::-1]


def weights(now: Node, after: Node, through: Sequence[Node]) -> list[float]:
    """Shares of the x0 seen at the nodes `through` in x' = (sigma' / sigma) x + sum_k w_k x0_k, exact where x0 is a
    polynomial in lam of one degree less than their number. Adams-Bashforth where all of them are `now` or before it,
    Adams-Moulton with `after` among them.

    They solve sum_k w_k r_k^n = alpha' m_n, with r_k = (lam_k - lam) / h, by Bjorck & Pereyra 1970, Math. Comp. 24.

    With pure noise among the nodes, where lam is infinite, the polynomial is in kappa = alpha / sigma: of the same
    equation, d(x / sigma) = x0 d kappa.
    """
    count = len(through)
    if any(isinf(n.lam) for n in through):
        start = now.alpha / now.sigma
        h = after.alpha / after.sigma - start
        found, scale = [1 / (n + 1) for n in range(count)], after.sigma * h
        r = [(n.alpha / n.sigma - start) / h for n in through]
    else:
        h = after.lam - now.lam
        found, scale = moments(h, count - 1), after.alpha
        r = [(n.lam - now.lam) / h for n in through]
    for k in range(count - 1):
        for i in range(count - 1, k, -1):
            found[i] -= r[k] * found[i - 1]
    for k in range(count - 2, -1, -1):
        for i in range(k + 1, count):
            found[i] /= r[i] - r[i - k - 1]
        for i in range(k, count - 1):
            found[i] -= found[i + 1]
    return [scale * w for w in found]


def inside(grid: Grid, share: float) -> list[Node | None]:
    """Of each step the node `share` of the way in lam; of a step from pure noise, where lam is infinite, in alpha /
    sigma; None where the step ends clean."""
    found = list(grid.between(share))
    now, after = grid.nodes[:2]
    if now.alpha == 0 and not after.clean:
        (found[0],) = grid.met([after.lam + log(share)])
    return found
