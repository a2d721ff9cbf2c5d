"""SDE-DPM-Solver++(2M), the stochastic multistep solver in x0."""

from __future__ import annotations

from math import exp, expm1, sqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver


@solver(order=lambda tau, **_: 1 if tau else 2, weak=2, stochastic=True, systems=("dpm-solver-pp",))
def sde_dpmpp_2m(x: Tensor, grid: Grid, noise: Noise, *, tau: Annotated[float, Field(ge=0, le=2)] = 1.0) -> Steps:
    """One call a step, from the last two x0, on any spacing. Lu et al. 2022, arXiv:2211.01095 sec. 5.

    With the noise of the reverse SDE scaled by tau its exact solution over a step h of lam is x' = sigma' / sigma
    e^(-tau^2 h) x + (1 + tau^2) alpha' int e^(-(1 + tau^2) (h - s)) x0(lam + s) ds + sigma' sqrt(1 - e^(-2 tau^2 h)) z
    (Xue et al. 2023, arXiv:2309.05019); x0 is taken half a step ahead, on the line through the last two. The
    noise is an increment on the clock e^(2 tau^2 lam), on which it is the exact Ito integral. First order where
    `dpmpp_2m` is.

    Strong order 1, as x0 moves with the noise inside a step. Weak order 2: the difference to the last x0 carries the
    noise of the step before, whose covariance with the state is the one that the step's own has in the exact solution.

    Args:
        tau: share of the noise (k-diffusion's eta is its square): 1 is the paper's SDE, 0 `dpmpp_2m` exactly.
    """
    before: tuple[Node, Tensor] | None = None
    for now, after in grid.steps():
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        h = after.lam - now.lam
        fresh = -expm1(-2 * tau**2 * h) if tau else 0.0
        rise, gain = -after.alpha * expm1(-(1 + tau**2) * h), after.sigma / now.sigma * sqrt(1 - fresh)
        if before is None:
            x = p.mix(x0=rise, x=gain)
        else:
            then, x0_then = before
            r = h / (2 * (now.lam - then.lam))
            x = p.mix(x0=rise * (1 + r), x=gain).sub_(x0_then, alpha=rise * r)
        if tau:
            z = noise(exp(2 * tau**2 * now.lam), exp(2 * tau**2 * after.lam), x)
            x.add_(z, alpha=after.sigma * sqrt(fresh))
        before = now, p.x0
    return x
