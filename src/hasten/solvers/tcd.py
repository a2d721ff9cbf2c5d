"""Strategic stochastic sampling, the sampler of trajectory consistency distillation."""

from __future__ import annotations

from dataclasses import replace
from math import exp, sqrt
from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid, nodes
from hasten.solvers.declare import Steps, solver


@solver(order=0, stochastic=True, few=True)
def tcd(x: Tensor, grid: Grid, noise: Noise, *, gamma: Annotated[float, Field(ge=0, le=1)] = 0.3) -> Steps:
    """Down the flow past the step's end t' to s = (1 - gamma) t', then noise up to t'; one call a step. Zheng et al.
    2024, arXiv:2402.19159 alg. 4.

    The way down is alpha_s x0 + sigma_s eps, where a network may know its end (`now.end`): with an exact one every
    state has its level's law. The way up is the forward process from s to t'. The last step goes straight to its end.
    0 is `flow_map`, deterministic; 1 is `consistency`. diffusers' s is floor((1 - gamma) i) in its table's steps, which
    in t is up to one step more.

    Raises:
        ValueError: gamma is above 0 and the grid was made of nodes alone.
    """
    ends = list(grid.nodes[1:])
    if gamma > 0 and len(ends) > 1:
        if grid.path is None:
            raise ValueError("tcd goes between the times of its grid: make the grid with grid.at(path, times)")
        ends[:-1] = nodes(grid.path, [(1 - gamma) * n.t for n in ends[:-1]])
    for (now, after), end in zip(grid.steps(), ends, strict=True):
        p = yield x, replace(now, end=end)
        x = p.mix(x0=end.alpha, eps=end.sigma)
        if end is not after:
            scale = after.alpha / end.alpha
            z = noise(exp(2 * now.lam), exp(2 * after.lam), x)
            x = x.mul_(scale).add_(z, alpha=sqrt(after.sigma**2 - (scale * end.sigma) ** 2))
    return x
