"""PNDM, Adams-Bashforth on eps with DDIM's transfer, after a start of higher order."""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal

from torch import Tensor

from hasten.denoiser import Prediction
from hasten.grid import Grid, Node
from hasten.solvers.adams import Point, settled, transfer
from hasten.solvers.declare import Steps, solver
from hasten.solvers.ipndm import ADAMS_BASHFORTH
from hasten.solvers.midpoint import halves


@solver(order=2, systems=("pndm",))
def pndm(x: Tensor, grid: Grid, *, warmup: Literal["shared", "plms", "prk"] = "shared") -> Steps:
    """One call a step after the start, from the last four eps, fewer while there are fewer. Liu et al. 2022,
    arXiv:2202.09778 alg. 2; second order, as the paper finds, because the weights, and the stages of the start, are
    those of a grid even in sigma / alpha.

    Args:
        warmup: "prk", the paper's F-PNDM, makes three steps of pseudo Runge-Kutta, four calls each; "plms" a first
            step of pseudo Heun, two calls, as the paper's S-PNDM and the pipelines of Stable Diffusion; "shared" makes
            that step with the second one's call, so that every step costs one: only this can start in the middle of a
            pipeline's times. A step from pure noise, or so near it that alpha grows more than tenfold and with it
            what the stages err by, is DDIM's, and the start comes after it.

    Raises:
        ValueError: "prk" on a grid that was made of nodes alone.
    """
    middles = halves(grid) if warmup == "prk" else [None] * len(grid)
    seen: list[Tensor] = []
    start: list[Point] = []  # of a step that is to be made Heun's
    for (now, after), middle in zip(grid.steps(), middles, strict=True):
        p = yield x, now
        if start and warmup == "shared":
            p = yield from settled(p, x, now, start, 2)
        elif start:
            base, then = start.pop()
            p = yield transfer(base, then, now, [base.eps, p.eps], (1 / 2, 1 / 2)), now
        seen, faint = [p.eps, *seen[:3]], after.alpha > 10 * now.alpha
        if middle is not None and not faint and len(seen) < 4 and not after.clean:
            x = yield from _runge_kutta(p, now, middle, after)
        else:
            x = transfer(p, now, after, seen, ADAMS_BASHFORTH[len(seen) - 1])
        if len(seen) == 1 and (warmup == "shared" or (warmup == "plms" and not faint)):
            start = [(p, now)]
        if faint:
            seen = []
    return x


def _runge_kutta(
    p: Prediction, now: Node, middle: Node, after: Node
) -> Generator[tuple[Tensor, Node], Prediction, Tensor]:
    """Runge and Kutta's method of four stages with the transfer for its steps: eq. 13."""
    e1 = p.eps
    e2 = (yield transfer(p, now, middle), middle).eps
    e3 = (yield transfer(p, now, middle, [e1, e2], (0, 1)), middle).eps
    e4 = (yield transfer(p, now, after, [e1, e3], (0, 1)), after).eps
    return transfer(p, now, after, [e1, e2, e3, e4], (1 / 6, 1 / 3, 1 / 3, 1 / 6))
