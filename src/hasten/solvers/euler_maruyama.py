"""Euler-Maruyama on the reverse SDE in time."""

from __future__ import annotations

from math import exp, expm1, sqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=1, weak=1, stochastic=True, systems=("score-sde",))
def euler_maruyama(x: Tensor, grid: Grid, noise: Noise, *, tau: Annotated[float, Field(ge=0, le=2)] = 1.0) -> Steps:
    """One call a step of dx = [f x - (1 + tau^2) / 2 g^2 score] dt + tau g dw, score = -eps / sigma: the drift is the
    flow's velocity and tau^2 g^2 eps / (2 sigma). Song et al. 2020, arXiv:2011.13456 eq. 6 and appendix E.

    Per unit of lam the SDE pulls eps down by 1 + tau^2, and lam moves by g^2 / (2 sigma^2) per unit of time. A step in
    which that makes more than 2 is longer than an explicit method can take, as it always is from pure noise, where g is
    infinite; there x0 and eps are held over the step, whose noise is then exact (Lu et al. 2022, arXiv:2211.01095
    sec. 5). So it is with the step that ends clean.

    Args:
        tau: noise: 1 is the reverse SDE, 0 the flow, and in between and above all have the same marginals.
    """
    for now, after in grid.steps():
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        h, forgets = now.t - after.t, now.diffusion / (2 * now.sigma)
        if h * forgets * (1 + tau**2) > 2 * now.sigma:
            fresh = -expm1(2 * tau**2 * (now.lam - after.lam)) if tau else 0.0
            x, deviation = p.mix(x0=after.alpha, eps=after.sigma * sqrt(1 - fresh)), after.sigma * sqrt(fresh)
        else:
            x = p.mix(x0=-h * now.dalpha, eps=-h * (now.dsigma + tau**2 * forgets), x=1)
            deviation = tau * sqrt(h * now.diffusion)
        if tau:
            x.add_(noise(exp(2 * now.lam), exp(2 * after.lam), x), alpha=deviation)
    return x
