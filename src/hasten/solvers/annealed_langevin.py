"""Annealed Langevin dynamics, the sampler of noise-conditional score networks."""

from __future__ import annotations

from math import sqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(order=0, calls=lambda inner, **_: inner, stochastic=True, systems=("ncsn",))
def annealed_langevin(
    x: Tensor, grid: Grid, noise: Noise, *,
    inner: Annotated[int, Field(ge=1, le=1000, json_schema_extra={"high": 10})] = 5,
    step: Annotated[float, Field(gt=0, le=2)] = 0.2,
    denoise: bool = True,
) -> Steps:  # fmt: skip
    """`inner` Langevin steps at every level of noise, then on to the next level with the picture as it is. Song & Ermon
    2019, arXiv:1907.05600 alg. 1. It discretises no ODE, so it has no order.

    There x = x0 + sigma z; on any path x / alpha is that, with noise sigma / alpha, and a step of alpha_i = step
    (sigma / alpha)^2 along the score -eps alpha / sigma reads x - step / 2 sigma eps + sqrt(step) sigma z, which is
    defined at pure noise as well. From there x / alpha can't be kept: the next level starts from noise alone, as the
    paper's first one does. The clock of its noise is Langevin time, `step` an update.

    Args:
        inner: T, the updates a level; the paper takes 100 on 10 levels.
        step: epsilon / sigma_L^2; the paper's 2e-5 / 0.01^2 is 0.2.
        denoise: where the grid ends clean, the last update is x0 itself, as arXiv:2009.05475 advises; False
            returns the state with the last level's noise, as alg. 1 does.
    """
    levels = [n for n in grid.nodes if not n.clean]
    clock = 0.0
    for now, after in zip(levels, [*levels[1:], grid.nodes[-1]], strict=True):
        for i in range(inner):
            p = yield x, now
            if denoise and after.clean and i == inner - 1:
                return p.mix(x0=after.alpha)
            z = noise(clock, clock + step, x)
            x = p.mix(eps=-step / 2 * now.sigma, x=1).add_(z, alpha=sqrt(step) * now.sigma)
            clock += step
        x = x * (after.alpha / now.alpha if now.alpha else after.sigma / now.sigma)
    return x
