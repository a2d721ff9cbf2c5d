"""The sampler of latent consistency models."""

from __future__ import annotations

from math import exp, sqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=0, stochastic=True, few=True)
def lcm(
    x: Tensor, grid: Grid, noise: Noise, *,
    scaling: Annotated[float, Field(gt=0, le=1e6, json_schema_extra={"log": True})] = 10_000.0,
    sigma_data: Annotated[float, Field(gt=0, le=10)] = 0.5,
) -> Steps:  # fmt: skip
    """Multistep consistency sampling with f = c_skip x + c_out x0 around an ordinary network, one call a step. Luo et
    al. 2023, arXiv:2310.04378.

    c_skip = d^2 / ((s t)^2 + d^2) and c_out = s t / sqrt((s t)^2 + d^2) make f(x, 0) = x; with the large s that is used
    they are 0 and 1 at every time of a grid, and this is `consistency`.

    Args:
        scaling: s, of t in [0, 1]: diffusers' timestep_scaling, 10, times 1000 training steps.
        sigma_data: d.
    """
    for now, after in grid.steps():
        p = yield x, now
        scaled = scaling * now.t
        length = sqrt(scaled**2 + sigma_data**2)
        x = p.mix(x0=after.alpha * scaled / length, x=after.alpha * (sigma_data / length) ** 2)
        if not after.clean:
            x.add_(noise(exp(2 * now.lam), exp(2 * after.lam), x), alpha=after.sigma)
    return x
