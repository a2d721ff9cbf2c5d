"""Sampling with as much fresh noise as is wished, at the same marginals."""

from __future__ import annotations

from math import sqrt
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=1, weak=1, stochastic=True, systems=("stochastic-interpolants",))
def interpolant_sde(
    x: Tensor, grid: Grid, noise: Noise, *,
    level: Annotated[float, Field(ge=0, le=10, json_schema_extra={"high": 2})] = 1.0,
    form: Literal["sigma", "ends"] = "sigma",
) -> Steps:  # fmt: skip
    """Euler-Maruyama in time on dx = (v - epsilon s) dt + sqrt(2 epsilon) dw, run from noise to data: v = alpha' x0 +
    sigma' eps is the velocity of the flow, s = -eps / sigma the score, epsilon(t) any diffusion. Albergo et al. 2023,
    arXiv:2303.08797 sec. 2.3; Ma et al. 2024, arXiv:2401.08740 sec. 2.4.

    One call a step. The marginals are the flow's whatever epsilon, so it may be chosen after training; `level` = 0 is
    `euler`, and `euler_maruyama` has epsilon = tau^2 g^2 / 2. The noise's clock is t. A step to a clean end gives x0.

    Args:
        level: c, how much noise.
        form: of epsilon, "sigma" c sigma(t), "ends" c alpha(t) sigma(t), which leaves both ends alone.
    """
    for now, after in grid.steps():
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        h, share = now.t - after.t, level * (now.alpha if form == "ends" else 1.0)  # epsilon / sigma
        x = p.mix(x0=-h * now.dalpha, eps=-h * (now.dsigma + share), x=1)
        if share > 0:
            x = x.add_(noise(now.t, after.t, x), alpha=sqrt(2 * share * now.sigma * h))
    return x
