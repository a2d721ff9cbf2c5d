"""Starting late: from an estimate with noise on it, at a time of the grid, instead of from noise alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Denoiser
from hasten.grid import Grid, Node
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve

systems = ("es-ddpm",)


def noised(x0: Tensor, node: Node, rng: torch.Generator | None = None) -> Tensor:
    """alpha x0 + sigma eps, fresh noise on x0 [B, ...] to the level of a node."""
    device = x0.device if rng is None else rng.device
    eps = torch.randn(x0.shape, generator=rng, dtype=x0.dtype, device=device).to(x0.device)
    return torch.mul(x0, node.alpha).add_(eps, alpha=node.sigma)


def tail(grid: Grid, t0: float) -> Grid | None:
    """The grid from its first node at or below `t0` on; None where only its end is left, so no step.

    Raises:
        ValueError: t0 lies outside the grid.
    """
    first, last = grid.nodes[0].t, grid.nodes[-1].t
    if not last <= t0 <= first:
        raise ValueError(f"t0 is a time of the grid, from {first} to {last}; got {t0}")
    index = next(i for i, n in enumerate(grid.nodes) if n.t <= t0 + 1e-9)  # 1 - 14 / 20 is a little above 0.3
    return grid.since(index) if index < len(grid) else None


def sample(
    solver: Solver, denoise: Denoiser, x0: Tensor, grid: Grid, t0: float,
    rng: torch.Generator | None = None, noise: Noise | None = None,
) -> Tensor:  # fmt: skip
    """From the estimate x0 [B, ...], noised to the grid's first node at or below `t0`, along the rest of the grid.

    With x0 a guide picture this is SDEdit, t0 its strength (Meng et al. 2021, arXiv:2108.01073 alg. 1): t0 at the end
    returns x0 itself, t0 at the start, where that is pure noise, is the plain run. With x0 the samples of any other
    generator it is ES-DDPM with T' = t0 (Lyu et al. 2022, arXiv:2205.12524): only the steps below t0 are paid
    for, and what the generator gets wrong at scales below the noise there is drawn afresh. A generator of x at t0
    itself, as TDPM trains one (Zheng et al. 2022, arXiv:2202.09671), needs no noise: `solve` from `tail(grid, t0)`.

    Args:
        rng: of the noise on x0.
        noise: what a stochastic solver adds on the way.

    Raises:
        ValueError: t0 lies outside the grid.
    """
    rest = tail(grid, t0)
    return x0 if rest is None else solve(solver, denoise, noised(x0, rest.nodes[0], rng), rest, noise)
