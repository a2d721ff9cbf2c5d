"""SDE-DPM-Solver++(3M), the stochastic multistep solver in x0 from three of them."""

from __future__ import annotations

from math import exp, expm1, isinf, sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver
from hasten.solvers.exponential import weights
from hasten.solvers.sa_solver import stretched


@solver(order=lambda tau, **_: 1 if tau else 3, weak=2, stochastic=True, systems=("dpm-solver-pp",))
def sde_dpmpp_3m(x: Tensor, grid: Grid, noise: Noise, *, tau: Annotated[float, Field(ge=0, le=2)] = 1.0) -> Steps:
    """One call a step, from the last three x0: the exact integral of the parabola through them, on any spacing, beside
    the exact noise of `sde_dpmpp_2m`. Crowson, k-diffusion, `sample_dpmpp_3m_sde`, after Lu et al. 2022,
    arXiv:2211.01095; Xue et al. 2023, arXiv:2309.05019 eq. 14.

    k-diffusion's d2, like the D2 of diffusers, is half of the second derivative that it stands for: without noise both
    are of second order. Start and end are those of `dpmpp_3m`: the first step is mended by the trapezoid in (alpha /
    sigma)^(1 + tau^2) as soon as the x0 at its end is known.

    Args:
        tau: share of the noise (k-diffusion's eta is its square); 0 is `dpmpp_3m`.
    """
    rate = 1 + tau**2
    seen: list[tuple[Node, Tensor]] = []  # the newest first
    for left, (now, after) in zip(range(len(grid), 0, -1), grid.steps(), strict=True):
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        state, x0 = p.x, p.x0
        if now is grid.nodes[1]:
            then, x0_then = seen[0]
            state = state - now.alpha * expm1(rate * (then.lam - now.lam)) / 2 * (x0 - x0_then)
            seen = [] if isinf(then.lam) else seen
        seen = [(now, x0), *seen[: min(3, left) - 1 if grid.nodes[-1].clean else 2]]
        fresh = -expm1(2 * tau**2 * (now.lam - after.lam)) if tau else 0.0
        x = torch.mul(state, after.sigma / now.sigma * sqrt(1 - fresh))
        for w, (_, x0_seen) in zip(weights(*stretched(rate, now, after, seen)), seen, strict=True):
            x.add_(x0_seen, alpha=w)
        if tau:
            z = noise(exp(2 * tau**2 * now.lam), exp(2 * tau**2 * after.lam), x)
            x.add_(z, alpha=after.sigma * sqrt(fresh))
    return x
