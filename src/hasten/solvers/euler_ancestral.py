"""Euler's ancestral sampler of k-diffusion."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid
from hasten.solvers.ddpm import ddpm
from hasten.solvers.declare import Steps, solver


@solver(order=1, weak=1, stochastic=True)
def euler_ancestral(
    x: Tensor, grid: Grid, noise: Noise, *,
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0,
    s_noise: Annotated[float, Field(ge=0, le=2)] = 1.0,
) -> Steps:  # fmt: skip
    """One call a step: with r = sigma / alpha, Euler's step of the flow down to r_down, then noise up to r', where
    r_up^2 = eta^2 r'^2 (1 - r'^2 / r^2) and r_down^2 = r'^2 - r_up^2. Crowson, k-diffusion, `sample_euler_ancestral`.

    On x / alpha an Euler step keeps x0 and eps, so x' / alpha' = x0 + r_down eps + r_up z, which is DDIM's step with
    this eta: the sampler is `ddpm` under another name, but for `s_noise`, which scales the noise.
    """
    return (yield from ddpm.run(x, grid, lambda start, stop, like: s_noise * noise(start, stop, like), eta=eta))
