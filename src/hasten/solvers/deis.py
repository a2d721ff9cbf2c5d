"""DEIS, exponential integrators with polynomials through the last eps."""

from __future__ import annotations

from math import inf, log
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.grid import Grid
from hasten.solvers.adams import multistep
from hasten.solvers.declare import Steps, solver


@solver(order=lambda order, corrected, **_: order if corrected else min(order, 2), systems=("deis",))
def deis(
    x: Tensor, grid: Grid, *,
    order: Annotated[int, Field(ge=1, le=3)] = 3,
    variant: Literal["tab", "rhoab", "logrho"] = "tab",
    corrected: bool = True,
) -> Steps:  # fmt: skip
    """One call a step: the integral of eps over sigma / alpha, with eps a polynomial through the last ones. Zhang and
    Chen 2022, arXiv:2204.13902 sec. 3 (tAB-DEIS) and 4 (rhoAB-DEIS).

    Args:
        order: the paper's degree and one: 1 is DDIM.
        variant: in what eps is a polynomial: in t, which alone of them uses what was seen at pure noise; in sigma /
            alpha, the same as `lms`; or in its logarithm, which is diffusers' DEIS (there a clean end is DDIM's).
        corrected: make the first step Heun's by the second call. Without it, as in the paper, it is DDIM's, and the
            order two at most.

    Raises:
        ValueError: variant "tab" on a grid that was made of nodes alone.
    """
    path = grid.path
    if variant == "tab" and path is None:
        raise ValueError("DEIS in t asks its path for times: make the grid with grid.at(path, times), or take rhoab")

    def place(ratios: list[float]) -> list[float]:
        if variant == "rhoab":
            return ratios
        if variant == "logrho" or path is None:
            return [log(r) if 0 < r < inf else inf for r in ratios]
        found: list[float] = path.time(-torch.tensor(ratios, dtype=torch.float64).log()).tolist()
        return found

    return (yield from multistep(x, grid, order, corrected, place))
