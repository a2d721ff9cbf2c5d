"""What a model does on a fine grid: states and predictions, kept for everything that is fitted to it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Grid, Node, nodes
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve


@dataclass(frozen=True)
class Trajectory:
    """A run of B samples over M steps.

    Attributes:
        grid: the M + 1 nodes.
        x: states at all nodes, [M + 1, B, ...].
        x0, eps: what the model saw at all nodes but the last, [M, B, ...].
    """

    grid: Grid
    x: Tensor
    x0: Tensor
    eps: Tensor

    def at(self, t: float) -> Tensor:
        """The state at a time within the grid, [B, ...]: by Hermite's cubic between nodes, in (alpha, sigma): what a
        step of the solver would make of both ends' predictions.

        Raises:
            ValueError: the time lies outside.
        """
        met = self.grid.nodes
        if not met[-1].t <= t <= met[0].t:
            raise ValueError(f"the trajectory runs from t = {met[0].t} to {met[-1].t}; {t} lies outside")
        k = max(0, bisect_left([-n.t for n in met], -t) - 1)
        a, b = met[k], met[k + 1]
        if t in (a.t, b.t):
            return self.x[k] if t == a.t else self.x[k + 1]
        assert self.grid.path is not None
        (n,) = nodes(self.grid.path, [t])
        share = (a.t - t) / (a.t - b.t)
        last = k + 1 == len(self.x0)
        x0 = self.x0[k] if last else torch.lerp(self.x0[k], self.x0[k + 1], share / 2)
        eps = self.eps[k] if last else torch.lerp(self.eps[k], self.eps[k + 1], share / 2)
        return self.x[k] + (n.alpha - a.alpha) * x0 + (n.sigma - a.sigma) * eps

    def thinned(self, points: int) -> Trajectory:
        """At about this many of its steps' nodes, evenly, both ends among them."""
        every = max(1, round(len(self.x0) / points))
        keep = [*range(0, len(self.x0), every), len(self.x0)]
        grid = Grid(tuple(self.grid.nodes[i] for i in keep), self.grid.path)
        return Trajectory(grid, self.x[keep], self.x0[keep[:-1]], self.eps[keep[:-1]])

    def rows(self, rows: slice) -> Trajectory:
        """Of some of the samples."""
        return Trajectory(self.grid, self.x[:, rows], self.x0[:, rows], self.eps[:, rows])


def record(
    solver: Solver, denoise: Denoiser, x: Tensor, grid: Grid, tick: Callable[[int], None] = lambda n: None
) -> Trajectory:
    """Runs `solver` over `grid` from x, [B, ...], and keeps what it saw at the grid's own nodes.

    Args:
        tick: told 1 after each network call.
    """
    here: dict[Node, Prediction] = {}
    wanted = set(grid.nodes)

    def watched(x: Tensor, node: Node) -> Prediction:
        p = denoise(x, node)
        tick(1)
        if node in wanted:
            here[node] = p  # a solver of more calls comes back to a node: the last one starts the step
        return p

    with torch.no_grad():
        end = solve(solver, watched, x, grid)
    found = [here[n] for n in grid.nodes[:-1]]
    states = [*(p.x for p in found), end]
    return Trajectory(grid, torch.stack(states), *(torch.stack([getattr(p, k) for p in found]) for k in ("x0", "eps")))
