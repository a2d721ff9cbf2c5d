"""Runs a solver: the standalone driver. (The other one is the scheduler in `bridge`.)"""

from __future__ import annotations

import math
from dataclasses import dataclass
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
    if math.isnan(p.other.sum()):  # a NaN reaches the sum in one pass
        raise ValueError(f"the network answered NaN at t = {query[1].t:.4f}: lower its guidance or use float32")
    return p


@dataclass
class Counted:
    """A denoiser that counts: `calls` for each state that the network saw, `passes` for each time that it was run.

    A batch of K states is K calls and one pass, where `denoise` can answer it at once; a derivative is a call and a
    pass of its own.
    """

    denoise: Denoiser
    calls: int = 0
    passes: int = 0

    def __call__(self, x: Tensor, n: Node) -> Prediction:
        self.calls, self.passes = self.calls + 1, self.passes + 1
        return self.denoise(x, n)

    def many(self, xs: Tensor, nodes: tuple[Node, ...]) -> list[Prediction]:
        """One question of `Many`."""
        self.calls += len(nodes)
        self.passes += 1 if hasattr(self.denoise, "many") else len(nodes)
        return list(answer(self.denoise, Many(xs, nodes)))

    def jet(self, *question: Any) -> tuple[Prediction, Tensor]:
        """One question of `Jet`."""
        self.calls, self.passes = self.calls + 2, self.passes + 2
        p, rise = answer(self.denoise, Jet(*question))
        return p, rise


def visited(solver: Solver, grid: Grid) -> list[Node]:
    """The node of each network call the solver will make, in order."""
    nodes: list[Node] = []

    def note(x: Tensor, node: Node) -> Prediction:
        nodes.append(node)
        return Prediction(x, x, x, spread=x)

    solve(solver, note, torch.zeros(()), grid, lambda start, stop, like: like)
    return nodes
