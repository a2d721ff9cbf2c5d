"""GENIE's truncated Taylor method: the curvature of the trajectory from a derivative of the network along it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from hasten.denoiser import Prediction
from hasten.grid import Grid, Node
from hasten.solvers.declare import Jet, solver


@solver(order=2, calls=2, asks="jets", systems=("genie",))
def genie(x: Tensor, grid: Grid) -> Generator[Jet | tuple[Tensor, Node], Any, Tensor]:
    """Second order, one call and one derivative a step: with gamma = sigma / alpha and y = x / alpha, y' = y + h eps +
    h^2 / 2 d eps / d gamma, where h = gamma' - gamma. Dockhorn et al. 2022, arXiv:2210.05475 eq. 9.

    The derivative is the total one along the trajectory, in which x moves by alpha' x0 + sigma' eps as t moves by 1
    (its eq. 12, whose two Jacobian-vector products are one here). Taken in t, it is divided by d gamma / dt =
    (sigma' - gamma alpha') / alpha. From pure noise, where gamma is infinite, the step is DDIM's.
    """
    for now, after in grid.steps():
        if now.alpha == 0:
            p = yield x, now
            x = p.mix(x0=after.alpha, eps=after.sigma)
            continue
        p, rise = yield Jet(x, now, _velocity(now), 1.0)
        gamma = now.sigma / now.alpha
        h = after.sigma / after.alpha - gamma
        bend = after.alpha * h * h / 2 * now.alpha / (now.dsigma - gamma * now.dalpha)
        x = p.mix(x0=after.alpha, eps=after.sigma).add_(rise, alpha=bend)
    return x


def _velocity(n: Node) -> Callable[[Prediction], Tensor]:
    """dx/dt of the trajectory."""
    return lambda p: p.mix(x0=n.dalpha, eps=n.dsigma)
