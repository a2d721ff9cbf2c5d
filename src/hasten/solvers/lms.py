"""LMS, the linear multistep method in sigma / alpha."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.adams import multistep
from hasten.solvers.declare import Steps, solver


@solver(order=lambda order, corrected, **_: order if corrected else min(order, 2))
def lms(
    x: Tensor, grid: Grid, *, order: Annotated[int, Field(ge=1, le=4)] = 3, corrected: bool = True
) -> Steps:  # fmt: skip
    """One call a step (of order 4 one more, at the second state): variable-step Adams-Bashforth on eps in sigma /
    alpha, the polynomials integrated exactly.

    The LMS of k-diffusion, DEIS's rhoAB (Zhang & Chen 2022, arXiv:2204.13902 sec. 4) and what zju-pi/diff-sampler calls
    iPNDM-v are this method. What was seen at pure noise, where sigma / alpha is infinite, is left out of the
    polynomials.

    Args:
        order: the eps that a step looks back on; 1 is DDIM.
        corrected: make the first step Heun's by the second call. Without it, as in the peers, it is DDIM's, and the
            order two at most.
    """
    return (yield from multistep(x, grid, order, corrected, lambda ratios: ratios))
