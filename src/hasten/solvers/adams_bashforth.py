"""Adams and Bashforth's method on the velocity of the straight path."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.adams import Point, settled, straight
from hasten.solvers.declare import Steps, solver


@solver(order=lambda order, corrected, **_: order if corrected else min(order, 2))
def adams_bashforth(
    x: Tensor, grid: Grid, *, order: Annotated[int, Field(ge=1, le=4)] = 2, corrected: bool = True
) -> Steps:  # fmt: skip
    """One call a step (of order 4 one more, at the second state): the last velocities eps - x0, and the weights of the
    very grid; fewer while there are fewer. Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, sec.
    III.5.

    Every path is the straight one but for its scale, and there nothing is singular: pure noise and the clean end are
    nodes as any others. Order 1 on the straight path is Euler's method.

    Args:
        order: the velocities that a step looks back on.
        corrected: make the first step Heun's by the second call; without it the order is two at most.
    """
    seen: list[Point] = []  # the newest first
    start: list[Point] = []
    for now, after in grid.steps():
        p = yield x, now
        if start:
            p = yield from settled(p, x, now, start, order)
        elif corrected and order > 1 and not seen:
            start = [(p, now)]
        seen = [(p, now), *seen[: order - 1]]
        x = straight(seen, after)
    return x
