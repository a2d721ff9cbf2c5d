"""SSCS: critically damped Langevin run backwards, its linear part exactly and its score between two halves of that."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.paths.cld import CLD
from hasten.solvers.declare import Steps, solver

systems = ("cld",)


@solver(order=1, stochastic=True)
def symmetric_splitting(u: Tensor, grid: Grid, noise: Noise) -> Steps:
    """One call a step, on CLD alone (`gddim.on_cld`): u is [2, B, ...], picture and velocity. Dockhorn et al. 2021,
    arXiv:2112.07068 alg. 1.

    Backwards du = -F u + G G^T score + G dw is split in two. -F u - G G^T S^-1 u + G dw, with S = diag(1, M) the law at
    rest, is the forward process with velocities turned round, which is known exactly; half a step of it, then v' = v +
    2 Gamma beta h (score_v + v / M) by Euler, then the other half. It is no pipeline's, as none has velocities; so its
    name is not its file's, under which the tree would list it.

    Raises:
        ValueError: the grid does not lie on CLD.
    """
    path: object = grid.path
    if not isinstance(path, CLD):
        raise ValueError("symmetric splitting runs on critically damped Langevin: make the grid with gddim.on_cld")
    turn = torch.tensor([1.0, -1.0]).to(u)[:, None].expand(2, u[0].numel()).reshape(u.shape)
    for now, after in grid.steps():
        half = torch.tensor((now.t - after.t) / 2, dtype=torch.float64)
        mean, spread = path.alpha(half).to(u), torch.linalg.cholesky(path.noise(half)).to(u)
        middle = (now.t + after.t) / 2

        def forward(u: Tensor, z: Tensor, mean: Tensor = mean, spread: Tensor = spread) -> Tensor:
            return turn * (torch.tensordot(mean, turn * u, 1) + torch.tensordot(spread, z, 1))

        u = forward(u, noise(1 - now.t, 1 - middle, u))
        p = yield u, now
        score = -torch.tensordot(torch.linalg.inv(now.sigma).mT.to(u), p.eps, 1)[1]
        kick = 4 * path.mass**0.5 * path.beta * (now.t - after.t) * (score + p.x[1] / path.mass)
        u = forward(torch.stack([p.x[0], p.x[1] + kick]), noise(1 - middle, 1 - after.t, u))
    return u
