"""gDDIM: DDIM where alpha and sigma are matrices, and its multistep form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hasten.grid import Grid
from hasten.paths.cld import CLD
from hasten.solvers.declare import Steps, solver

even = "start"
"""Its order shows where the first steps, of lower orders, are small."""

POINTS = 16
"""Of the quadrature in a step."""


def on_cld(path: CLD, times: Sequence[float]) -> Grid:
    """The grid at falling `times` in [0, 1] of a path of pairs, [2, B, ...]. Raises ValueError for other times."""
    nodes: Any = path.nodes(times)  # a grid is typed for paths of numbers
    along: Any = path
    return Grid(nodes, along)


@solver(order=lambda order, **_: order, systems=("gddim",))
def gddim(x: Tensor, grid: Grid, *, order: Annotated[int, Field(ge=1, le=3)] = 2) -> Steps:
    """One call a step, on any path and on CLD (`on_cld`). Zhang et al. 2022, arXiv:2206.05564 sec. 4.

    Of first order it keeps eps and changes its share, u' = alpha' alpha^-1 (u - sigma eps) + sigma' eps: on a path of
    numbers DDIM. That is exact in any step where eps is constant along the flow: with CLD's sigma of data that is one
    point, or a Gaussian that sigma counts in.

    Of higher order eps is a polynomial in t through the last ones, sum_j L_j eps_j, under the exact linear flow: u' =
    alpha' (alpha^-1 u + int sum_j L_j eps_j dN) with N = alpha^-1 sigma. The first steps use the eps there are; so the
    very first, which may start from pure noise, where N is infinite, is of first order.

    Raises:
        ValueError: a grid of nodes alone where the order is above one.
    """
    seen: list[Tensor] = []
    for (now, after), weights in zip(grid.steps(), _weights(grid, order), strict=True):
        p = yield x, now
        eps = p.eps
        if isinstance(now.alpha, float):
            x = p.mix(x0=after.alpha, eps=after.sigma)
        else:
            carried = after.alpha @ torch.linalg.inv(now.alpha)
            x = _times(carried, p.x) + _times(after.sigma - carried @ now.sigma, eps)
        for weight, then in zip(weights, seen, strict=False):
            x = x + _times(weight, then - eps)
        seen = [eps, *seen[: order - 2]] if order > 1 else []
    return x


def _times(matrix: Tensor, u: Tensor) -> Tensor:
    """[2, 2] on [2, B, ...], or a number."""
    return u * float(matrix) if matrix.ndim == 0 else torch.tensordot(matrix.to(u), u, 1)


def _weights(grid: Grid, order: int) -> list[list[Tensor]]:
    """Of each step alpha' int L_j dN for the eps before the last, newest first.

    By parts, as L_j is 0 at the start: L_j(t') sigma' - alpha' int L_j' N dt, which asks for no derivative of the path.
    """
    if order == 1:
        return [[] for _ in grid.steps()]
    if grid.path is None:
        raise ValueError("above order 1 gddim integrates along the path: make the grid with grid.at(path, times)")
    times = torch.tensor([n.t for n in grid.nodes], dtype=torch.float64)
    place, share = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(POINTS))
    width = times.diff()[:, None] / 2
    t = times[:-1, None] + width * (1 + place)  # [steps, points]
    alpha, sigma = grid.path.alpha(t), grid.path.sigma(t)
    ratio = sigma / alpha if alpha.ndim == 2 else torch.linalg.solve(alpha, sigma)
    found: list[list[Tensor]] = []
    for i, after in enumerate(grid.nodes[1:]):
        last_alpha, last_sigma = (torch.as_tensor(m, dtype=torch.float64) for m in (after.alpha, after.sigma))
        through = times[: i + 1].flip(0)[:order]
        found.append([])
        for j in range(1, len(through)):
            others = torch.cat([through[:j], through[j + 1 :]])
            scale = (through[j] - others).prod()
            slope = torch.ones_like(t[i]) if len(others) == 1 else (t[i, :, None] - others).sum(1)  # of at most two
            area = torch.tensordot(slope * share * width[i], ratio[i], 1) / scale
            held = (after.t - others).prod() / scale * last_sigma
            found[-1].append(held - (last_alpha * area if area.ndim == 0 else last_alpha @ area))
    return found
