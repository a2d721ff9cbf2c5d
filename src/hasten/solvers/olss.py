"""A multistep solver whose weights were fitted to one model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver

Row = Annotated[tuple[float, ...], Field(min_length=2)]


@solver(order=0, fitted=True)
def olss(x: Tensor, grid: Grid, *, weights: tuple[Row, ...] = ()) -> Steps:
    """One call a step: the next state is a fitted sum of the state and of the last x0, x' = w_x x + sum_j w_j x0_j.

    The weights come from `hasten fit` and belong to the grid that they were fitted with, one row a step: of x, of the
    newest x0, of the one before, and so on. No order is claimed: they are the least-squares answer for a few calls, not
    a formula for many. Duan et al. 2023, arXiv:2305.14677 (optimal linear subspace search).

    Raises:
        ValueError: there is not a row for every step.
    """
    if len(weights) != len(grid):
        raise ValueError(
            f"olss has weights for {len(weights)} steps and the grid has {len(grid)}: run `hasten fit` for this many"
        )
    seen: list[Tensor] = []
    for (now, _), (of_x, of_x0, *older) in zip(grid.steps(), weights, strict=True):
        p = yield x, now
        x = p.mix(x=of_x, x0=of_x0)
        for w, x0 in zip(older, seen, strict=False):
            x.add_(x0, alpha=w)
        seen = [p.x0, *seen[: max(map(len, weights)) - 2]]
    return x
