"""Runs a solver: the standalone driver. (The other one is the scheduler in `bridge`.)"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Grid, Node
from hasten.solvers.declare import Solver


def solve(solver: Solver, denoise: Denoiser, x: Tensor, grid: Grid) -> Tensor:
    """The sample, [B, ...], that `solver` reaches from `x` at grid.nodes[0]; `denoise` is asked at every node it
    visits."""
    steps = solver(x, grid)
    query = next(steps)
    while True:
        try:
            query = steps.send(denoise(*query))
        except StopIteration as end:
            return end.value


def visited(solver: Solver, grid: Grid) -> list[Node]:
    """The node of each network call the solver will make, in order."""
    nodes: list[Node] = []

    def note(x: Tensor, node: Node) -> Prediction:
        nodes.append(node)
        return Prediction(x, x, x)

    solve(solver, note, torch.zeros(()), grid)
    return nodes
