"""Moments of a stochastic solver's sample without sampling: on a Gaussian law every update is affine in the state and
in the noise, so one run on unit vectors tells the whole map."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.reference.laws import Gaussian
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve


@dataclass
class Recorded:
    """Noise that is zero, and the intervals it was asked for."""

    spans: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, start: float, stop: float, like: Tensor) -> Tensor:
        self.spans.append((start, stop))
        return torch.zeros_like(like)


def moments(solver: Solver, grid: Grid, law: Gaussian, denoise: Denoiser | None = None) -> tuple[float, float]:
    """Errors of mean and variance at the grid's end, where its start has the law's own."""
    ask, silent = denoise or law.denoise, Recorded()
    solve(solver, ask, torch.zeros(1, 1, dtype=torch.float64), grid, silent)
    x = torch.zeros(2 + len(silent.spans), 1, dtype=torch.float64)  # rows: nothing, a unit of x, a unit of each draw
    x[1], row = 1, 1

    def unit(start: float, stop: float, like: Tensor) -> Tensor:
        nonlocal row
        row += 1
        z = torch.zeros_like(like)
        z[row] = 1
        return z

    nothing, state, *draws = solve(solver, ask, x, grid, unit)[:, 0].tolist()
    start_mean, start_var = exact(law, grid.nodes[0])
    mean = nothing + (state - nothing) * start_mean
    var = (state - nothing) ** 2 * start_var + sum((d - nothing) ** 2 for d in draws)
    want = exact(law, grid.nodes[-1])
    return mean - want[0], var - want[1]


def exact(law: Gaussian, n: Node) -> tuple[float, float]:
    """Mean and variance of x at a node."""
    return n.alpha * law.mean, n.alpha**2 * law.var + n.sigma**2


def even_in_lam(path: Path, steps: int, start: float = -1.5, stop: float = 2.0) -> Grid:
    """The same lam on every path, so the same Brownian increments."""
    return at(path, path.time(torch.linspace(start, stop, steps + 1, dtype=torch.float64)).tolist())


def slopes(errors: list[float]) -> Tensor:
    """Of the errors at halved steps."""
    return -torch.tensor(errors, dtype=torch.float64).abs().log2().diff()
