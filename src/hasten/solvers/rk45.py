"""Dormand-Prince 5(4) with steps of its own choice: for any ODE, and as a solver of the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable, Generator
from math import atan2, cos, hypot, log, sin, sqrt, tan
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver

C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Stages two to seven; the seventh stands at the end of the step, with the weights of order five."""
E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Weights of order five less those of order four."""

Slopes = Generator[tuple[Tensor, float], Tensor, Tensor]
"""Asks for dy/ds at (y, s), returns y at the end."""


def dormand_prince(y: Tensor, start: float, stop: float, rtol: float, atol: float) -> Slopes:
    """Integrates y [B, ...] from `start` to `stop`, either way: six slopes a step, the last of which is the next
    step's first. Dormand & Prince 1980; Hairer, Norsett & Wanner, Solving ODEs I, table II.5.2.

    A step holds where the root mean square of error / (atol + rtol |y|) is at most 1 in every row. The next one's
    length is a PI controller's, Hairer & Wanner, Solving ODEs II, sec. IV.2, with exponents 0.7 / 5 and 0.4 / 5.

    Raises:
        ValueError: a tolerance is not above 0, or the steps shrink to nothing.
    """
    _check(rtol, atol)
    s, h, before, rejected = start, (stop - start) * min(1.0, rtol**0.2), 1.0, False
    slope = yield y, s
    while s != stop:
        last = abs(h) >= abs(stop - s) * (1 - 1e-9)
        h = stop - s if last else h
        slopes = [slope]
        for c, row in zip(C, A, strict=True):
            ahead = y + _sum(h, row, slopes)
            slopes.append((yield ahead, stop if last and c == 1 else s + c * h))
        scale = atol + rtol * y.abs().maximum(ahead.abs())
        error = float((_sum(h, E, slopes) / scale).detach().reshape(len(y), -1).square().mean(1).max().sqrt())
        if error <= 1:
            s, y, slope = stop if last else s + h, ahead, slopes[-1]
            growth = 0.9 * max(error, 1e-10) ** (-0.7 / 5) * before ** (0.4 / 5)
            h *= min(1.0 if rejected else 10.0, max(0.2, growth))
            before, rejected = max(error, 1e-4), False
        else:  # an error that is NaN comes here too
            h *= max(0.2, 0.9 * error ** (-1 / 5))
            rejected = True
            if abs(h) <= 1e-10 * abs(stop - start):
                raise ValueError(f"no step from {s:.4g} meets rtol = {rtol} and atol = {atol}: slopes jump, or are NaN")
    return y


def integrate(
    f: Callable[[float, Tensor], Tensor], y: Tensor, start: float, stop: float, rtol: float = 1e-5, atol: float = 1e-5
) -> Tensor:
    """y at `stop` of dy/ds = f(s, y), y [B, ...] at `start`, by `dormand_prince`; autograd may run through it."""
    steps = dormand_prince(y, start, stop, rtol, atol)
    at, s = next(steps)
    while True:
        try:
            at, s = steps.send(f(s, at))
        except StopIteration as end:
            return end.value


def _check(rtol: float, atol: float) -> None:
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"tolerances must be above 0, got rtol = {rtol} and atol = {atol}")


def _sum(h: float, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """h times the weighted sum."""
    total = slopes[0] * (h * weights[0])
    for w, k in zip(weights[1:], slopes[1:], strict=True):
        total = total if w == 0 else total + k * (h * w)
    return total


def angle(n: Node) -> float:
    """arctan(sigma / alpha): a time from 0, clean, to pi / 2, pure noise, that every path shares."""
    return atan2(n.sigma, n.alpha)


@solver(order=5, calls=6, adaptive=True, systems=("score-sde", "neural-ode"))
def rk45(
    x: Tensor, grid: Grid, *,
    rtol: Annotated[float, Field(gt=0, le=1)] = 1e-5,
    atol: Annotated[float, Field(gt=0, le=1)] = 1e-5,
) -> Steps:  # fmt: skip
    """Fifth order, six calls a step, as many steps as the tolerances ask for. Song et al. 2020, arXiv:2011.13456
    appendix D.4.

    Its variable is the angle phi = arctan(sigma / alpha), finite at both ends and the same on every path: y = x /
    |(alpha, sigma)| = cos(phi) x0 + sin(phi) eps moves as dy/dphi = cos(phi) eps - sin(phi) x0 (Salimans & Ho 2022,
    arXiv:2202.00512). Of the grid the ends alone count. No network is asked where clean: the last step there,
    from sigma = sqrt(atol) alpha, is DDIM's, which leaves out sigma^2 / 2 times the score.

    Raises:
        ValueError: the grid has no path, a tolerance is not above 0, or no step meets them.
    """
    _check(rtol, atol)
    first, last = grid.nodes[0], grid.nodes[-1]
    stop = atan2(sqrt(atol), 1.0) if last.clean else angle(last)
    at, start = first, angle(first)
    if start > stop:
        steps = dormand_prince(x / hypot(first.alpha, first.sigma), start, stop, rtol, atol)
        y, phi = next(steps)
        while True:
            if phi != start:
                at = last if phi == angle(last) else grid.met([-log(tan(phi))])[0]
            p = yield y * hypot(at.alpha, at.sigma), at
            try:
                y, phi = steps.send(p.mix(x0=-sin(phi), eps=cos(phi)))
            except StopIteration as end:
                y = end.value
                break
        at = grid.met([-log(tan(stop))])[0] if last.clean else last
        x = y * hypot(at.alpha, at.sigma)
    if not last.clean:
        return x
    p = yield x, at
    return p.mix(x0=last.alpha)
