"""Weights of a multistep solver by least squares against the model's own trajectory: no gradients, K calls."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.fit.trajectory import Trajectory
from hasten.grid import Grid

Weights = tuple[tuple[float, ...], ...]


def subspace(
    denoise: Denoiser, exact: Trajectory, grid: Grid, train: slice = slice(None), history: int = 4,
    ridge: float = 1e-3,
) -> tuple[Weights, Tensor]:  # fmt: skip
    """Rows for `solvers.olss`, fitted step by step on the states that the rows before lead to.

    At each step the exact state at its end is approximated by w_x x + sum_j w_j x0_j over all samples and elements: so
    that an error made before is corrected as far as a sum can. The penalty pulls towards DDIM's step, which is what
    infinite `ridge` gives. Duan et al. 2023, arXiv:2305.14677.

    Args:
        exact: the fine run of the same samples.
        train: rows of the batch that are fitted to; the others follow.
        history: x0 of earlier steps that are used besides the newest.
        ridge: of the penalty, as a share of each column's own energy.

    Returns:
        the weights, and the states that they lead to, [B, ...].

    Raises:
        ValueError: the grid does not start where the trajectory does.
    """
    if grid.nodes[0].t != exact.grid.nodes[0].t:
        raise ValueError(f"the trajectory starts at t = {exact.grid.nodes[0].t}, the grid at {grid.nodes[0].t}")
    x, rows = exact.x[0], []
    seen: list[Tensor] = []
    for now, after in grid.steps():
        with torch.no_grad():
            p = denoise(x, now)
        seen = [p.x0, *seen[:history]]
        ddim = [after.sigma / now.sigma, after.alpha - after.sigma / now.sigma * now.alpha, *[0.0] * (len(seen) - 1)]
        columns = torch.stack([x, *seen], -1).double()
        rows_NK = columns[train].flatten(0, -2)
        start = torch.tensor(ddim, dtype=torch.float64, device=x.device)
        gram = rows_NK.T @ rows_NK
        gram.diagonal().mul_(1 + ridge)
        left = exact.at(after.t)[train].flatten().double() - rows_NK @ start
        found = start + torch.linalg.solve(gram, rows_NK.T @ left)
        x = (columns @ found).to(x.dtype)
        rows.append(tuple(found.tolist()))
    return tuple(rows), x
