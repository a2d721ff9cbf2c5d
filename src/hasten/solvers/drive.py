"""Runs a solver: the standalone driver. (The other one is the scheduler in `bridge`.)"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Grid, Node
from hasten.solvers.declare import Jet, Many, Solver


class Able(Protocol):
    """A denoiser that can be asked for more than a point; `hasten.denoiser.denoiser` makes one."""

    def many(self, xs: Tensor, nodes: tuple[Node, ...]) -> list[Prediction]:
        """All in one network call."""
        ...


def solve(solver: Solver, denoise: Denoiser, x: Tensor, grid: Grid, noise: Noise | None = None) -> Tensor:
    """The sample, [B, ...], that `solver` reaches from `x` at grid.nodes[0]; `denoise` is asked at every node it
    visits.

    Args:
        noise: what stochastic solvers add, such as `Brownian.of(generator)`.

    Raises:
        ValueError: a stochastic solver without noise, a solver that asks for derivatives of a denoiser that has none,
            or an answer with a NaN.
    """
    steps = solver(x, grid, noise)
    query = next(steps)
    while True:
        try:
            query = steps.send(answer(denoise, query))
        except StopIteration as end:
            return end.value


def answer(denoise: Denoiser, query: Any) -> Any:
    """What `denoise` says to a question of any kind."""
    match query:
        case Many(xs, nodes):
            many = getattr(denoise, "many", None)
            return many(xs, nodes) if many else [denoise(x, n) for x, n in zip(xs, nodes, strict=True)]
        case Jet(x, node, dx, dt):
            jet = getattr(denoise, "jet", None)
            if jet is None:
                raise ValueError("this solver asks for derivatives: make the denoiser with hasten.denoiser.denoiser")
            return jet(x, node, dx, dt)
    p = denoise(*query)
    if p.other.dtype.is_floating_point and bool(torch.isnan(p.other).any()):
        raise ValueError(f"the network answered NaN at t = {query[1].t:.4f}: lower its guidance or use float32")
    return p


def visited(solver: Solver, grid: Grid) -> list[Node]:
    """The node of each network call the solver will make, in order."""
    nodes: list[Node] = []

    def note(x: Tensor, node: Node) -> Prediction:
        nodes.append(node)
        return Prediction(x, x, x)

    solve(solver, note, torch.zeros(()), grid, lambda start, stop, like: like)
    return nodes
