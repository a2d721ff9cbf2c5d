"""What a solver is: a generator that asks for predictions along a grid, and declares its order and its calls."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from torch import Tensor

from hasten.denoiser import Prediction
from hasten.grid import Grid, Node

Steps = Generator[tuple[Tensor, Node], Prediction, Tensor]
"""Asks (x, node), is told a Prediction, returns the sample. The state is what the reply says (`p.x`): a caller may
edit it."""


@dataclass(frozen=True)
class Solver:
    """A solver with its claims.

    Attributes:
        order: the error falls as (1 / steps) ** order on a smooth grid.
        calls: network calls a step.
        stochastic: adds fresh noise on the way.
        systems: ids of the catalogue that it implements.
    """

    run: Callable[[Tensor, Grid], Steps]
    order: int
    calls: int = 1
    stochastic: bool = False
    systems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("__doc__", "__name__", "__module__"):
            object.__setattr__(self, name, getattr(self.run, name))

    def __call__(self, x: Tensor, grid: Grid) -> Steps:
        return self.run(x, grid)


def solver(
    order: int, calls: int = 1, *, stochastic: bool = False, systems: tuple[str, ...] = ()
) -> Callable[[Callable[[Tensor, Grid], Steps]], Solver]:
    """Declares a generator function as a solver."""
    return lambda run: Solver(run, order, calls, stochastic, systems)
