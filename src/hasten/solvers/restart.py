"""Restart: an ODE solver that goes back up in noise and down again, some times, over one interval."""

from __future__ import annotations

from math import log, sqrt
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.ddim import ddim
from hasten.solvers.declare import Steps, solver
from hasten.solvers.heun import heun

BASES = {"heun": heun, "ddim": ddim}


@solver(order=0, calls=lambda base, **_: BASES[base].calls, stochastic=True)
def restart(
    x: Tensor, grid: Grid, noise: Noise, *,
    base: Literal["heun", "ddim"] = "heun",
    rounds: Annotated[int, Field(ge=0, le=100, json_schema_extra={"high": 4})] = 1,
    low: Annotated[float, Field(gt=0, le=100, json_schema_extra={"log": True, "low": 0.02, "high": 0.2})] = 0.06,
    high: Annotated[float, Field(gt=0, le=100, json_schema_extra={"log": True, "low": 0.3, "high": 2})] = 0.3,
) -> Steps:  # fmt: skip
    """Down to t_min; then `rounds` times fresh noise up to t_max and the base's steps back down; then on to the end. Xu
    et al. 2023, arXiv:2306.14878 sec. 4.1 and alg. 2.

    Fresh noise forgets the errors made so far, the ODE makes few new ones. The ends of the interval are the grid's
    nodes nearest to `low` and `high`, at least one step apart, and its steps are the grid's own (the paper lays them
    apart): with m of them N + rounds m steps are taken in all, each of the base's calls. 0 rounds are the base itself,
    bit for bit, and with the nodes at the ends held the error falls with the base's order. The clock of the noise
    counts the rounds.

    Args:
        base: the paper's Heun, or DDIM at one call a step.
        rounds: K.
        low, high: t_min and t_max in sigma / alpha; the defaults are the paper's for CIFAR-10 (data of deviation 0.5).

    Raises:
        ValueError: low is not below high.
    """
    if low >= high:
        raise ValueError(f"restart goes from low up to high in sigma / alpha, got low={low}, high={high}: swap them")
    go = BASES[base]
    noisy = [i for i, n in enumerate(grid.nodes) if n.alpha and not n.clean]
    if len(noisy) < 2:  # no step to go back over
        return (yield from go(x, grid))
    stop = min(noisy[1:], key=lambda i: abs(grid.nodes[i].lam + log(low)))
    start = min(stop - 1, min(noisy, key=lambda i: abs(grid.nodes[i].lam + log(high))))
    bottom, top = grid.nodes[stop], grid.nodes[start]
    x = yield from go(x, Grid(grid.nodes[: stop + 1], grid.path))
    for k in range(rounds):
        scale = top.alpha / bottom.alpha
        z = noise(float(k), float(k + 1), x)
        x = (x * scale).add_(z, alpha=sqrt(top.sigma**2 - (scale * bottom.sigma) ** 2))
        x = yield from go(x, Grid(grid.nodes[start : stop + 1], grid.path))
    return x if stop == len(grid) else (yield from go(x, grid.since(stop)))
