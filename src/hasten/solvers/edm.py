"""EDM's stochastic sampler: noise up, then Heun's method down."""

from __future__ import annotations

from math import exp, log1p, sqrt
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver


@solver(
    order=lambda s_churn, order, **_: 1 if s_churn else order,
    calls=lambda order, **_: order,
    weak=2,
    stochastic=True,
    systems=("edm",),
)
def edm(
    x: Tensor, grid: Grid, noise: Noise, *,
    s_churn: Annotated[float, Field(ge=0, le=200)] = 0.0,
    s_tmin: Annotated[float, Field(ge=0, le=1e4)] = 0.0,
    s_tmax: Annotated[float, Field(ge=0, le=1e4)] = 1e4,
    s_noise: Annotated[float, Field(ge=0.5, le=2)] = 1.0,
    order: Literal[1, 2] = 2,
) -> Steps:  # fmt: skip
    """Two calls a step, one in the last: with r = sigma / alpha, each step first raises r by the share gamma =
    min(s_churn / steps, sqrt(2) - 1) with fresh noise, then goes down the flow by Heun's method. Karras et al. 2022,
    arXiv:2206.00364 alg. 2; its settings for ImageNet are 40, 0.05, 50 and 1.003.

    Noise is added exactly and the flow keeps the marginals, so the weak order is that of the steps down. `s_churn` = 0
    is `heun`. r is never raised above the largest of the path: there, and at pure noise, nothing is added.

    Args:
        s_churn: noise of the whole run.
        s_tmin, s_tmax: the r between which it is added.
        s_noise: its deviation.
        order: 2 is Heun's method, 1 Euler's, with one call a step.

    Raises:
        ValueError: churn on a grid that was made of nodes alone.
    """
    gamma = min(s_churn / len(grid), sqrt(2) - 1)
    for now, up, (_, after) in zip(grid.nodes, _raised(grid, gamma, s_tmin, s_tmax), grid.steps(), strict=False):
        if up is not now:
            a = up.alpha / now.alpha
            start = exp(2 * now.lam)
            z = noise(start, 2 * start if after.clean else exp(2 * after.lam), x)
            x = torch.mul(x, a).add_(z, alpha=s_noise * sqrt(up.sigma**2 - (a * now.sigma) ** 2))
        p = yield x, up
        ahead = p.mix(x0=after.alpha, eps=after.sigma)
        if after.clean or order == 1:
            x = ahead
            continue
        q = yield ahead, after
        da, ds = after.alpha - up.alpha, after.sigma - up.sigma
        x = q.mix(x0=da / 2, eps=ds / 2, x=1) - p.mix(x0=da / 2, eps=ds / 2)
    return x


def _raised(grid: Grid, gamma: float, s_tmin: float, s_tmax: float) -> list[Node]:
    """The node from which each step goes down."""
    starts = list(grid.nodes[:-1])
    churned = [i for i, n in enumerate(starts) if gamma and n.alpha and s_tmin <= n.sigma / n.alpha <= s_tmax]
    if churned:
        for i, up in zip(churned, grid.met([starts[i].lam - log1p(gamma) for i in churned]), strict=True):
            starts[i] = up if up.lam < starts[i].lam else starts[i]
    return starts
