"""The ODE backwards: from a sample to its noise."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Grid, Node
from hasten.path import Path
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve


@dataclass(frozen=True)
class Mirrored:
    """A path with signal and noise, and the ends of time, exchanged."""

    path: Path

    def alpha(self, t: Tensor) -> Tensor:
        return self.path.sigma(1 - t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.path.alpha(1 - t)

    def time(self, lam: Tensor) -> Tensor:
        return 1 - self.path.time(-lam)


def encode(solver: Solver, denoise: Denoiser, x: Tensor, grid: Grid) -> Tensor:
    """The state at grid.nodes[0], [B, ...], from which the ODE comes to `x` at its last node; `solver`, any that is
    deterministic, runs along the grid backwards. Song et al. 2020, arXiv:2010.02502 sec. 4.3, with `ddim`.

    x = alpha x0 + sigma eps and dx = x0 d(alpha) + eps d(sigma) stay as they are where x0 and eps, alpha and sigma are
    exchanged; lam then changes its sign, and a grid that rises falls. An error of the solver's order remains, and
    `solve` from the result comes back to `x` up to twice that. Where the grid ends clean no network says what noise is,
    and it is asked one node further.

    Raises:
        ValueError: a single step between clean and pure noise, which forgets all.
    """
    _refuse_forgetting(grid)
    clean, above = grid.nodes[-1], grid.nodes[-2]

    def ask(x: Tensor, mirrored: Node) -> Prediction:
        n = _mirror(mirrored)
        if n.clean:
            return Prediction(x, denoise(x * (above.alpha / clean.alpha), above).eps, x / clean.alpha)
        p = denoise(x, n)
        return Prediction(x, p.one, p.other, of_x0=p.of_eps, of_eps=p.of_x0)

    backwards = Grid(tuple(_mirror(n) for n in reversed(grid.nodes)), Mirrored(grid.path) if grid.path else None)
    return solve(solver, ask, x, backwards)


def undo(denoise: Denoiser, x: Tensor, grid: Grid, rounds: int = 10) -> Tensor:
    """The state at grid.nodes[0], [B, ...], that `ddim` takes to `x` along this very grid: the inverse of its steps and
    not of the ODE, so that few steps come back as exactly as many.

    By fixed-point iteration, `rounds` calls a step: y rises by alpha' / alpha times what DDIM's step from it falls
    short of x, which is to take eps from y again (Pan et al. 2023, arXiv:2309.04907); at pure noise, where that is
    zero, by sigma' / sigma times. Each round leaves a share of the error, the smaller the shorter the step.

    Raises:
        ValueError: a single step between clean and pure noise, which forgets all.
    """
    _refuse_forgetting(grid)
    eps = x * 0
    for cleaner, noisier in pairwise(reversed(grid.nodes)):
        rate = noisier.alpha / cleaner.alpha
        y = (x - cleaner.sigma * eps) * rate + noisier.sigma * eps
        for _ in range(rounds):
            p = denoise(y, noisier)
            short = x - p.mix(x0=cleaner.alpha, eps=cleaner.sigma)
            y, eps = y + (rate or noisier.sigma / cleaner.sigma) * short, p.eps
        x = y
    return x


def _mirror(n: Node) -> Node:
    return Node(1 - n.t, n.sigma, n.alpha, -n.lam, -n.dsigma, -n.dalpha)


def _refuse_forgetting(grid: Grid) -> None:
    if len(grid) == 1 and grid.nodes[0].alpha == 0 and grid.nodes[-1].clean:
        raise ValueError("one step from pure noise to clean forgets the noise: give a grid of two steps or more")
