"""The midpoint method, in (alpha, sigma)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from hasten.grid import Grid, Node, nodes
from hasten.solvers.declare import Steps, solver


@solver(order=2, calls=2)
def midpoint(x: Tensor, grid: Grid, *, middle: Literal["t", "lam"] = "t") -> Steps:
    """Second order, two calls a step (one in the last, which ends clean): DDIM to the middle, and from the start all of
    the way with what is seen there.

    The ODE is dx = x0 d(alpha) + eps d(sigma), so that nothing is divided by alpha or sigma. On the straight path it is
    the textbook's, as flow models are sampled with (Lipman et al. 2024, arXiv:2412.06264); on EDM's with the middle in
    lam it is k-diffusion's DPM2, which diffusers calls KDPM2.

    Args:
        middle: the half time, which runs from pure noise as well; or half of the way in lam, where a step from pure
            noise, whose lam is infinite, is DDIM's.

    Raises:
        ValueError: the grid was made of nodes alone.
    """
    for (now, after), half in zip(grid.steps(), halves(grid) if middle == "t" else grid.between(0.5), strict=True):
        p = yield x, now
        if after.clean or half is None:
            x = p.mix(x0=after.alpha, eps=after.sigma)
            continue
        q = yield p.mix(x0=half.alpha, eps=half.sigma), half
        x = q.mix(x0=after.alpha - now.alpha, eps=after.sigma - now.sigma).add_(p.x)
    return x


def halves(grid: Grid) -> tuple[Node, ...]:
    """The node at the half time of each step. Raises ValueError where the grid was made of nodes alone."""
    if grid.path is None:
        raise ValueError("this solver asks between the times of its grid: make the grid with grid.at(path, times)")
    return nodes(grid.path, [(now.t + after.t) / 2 for now, after in grid.steps()])
