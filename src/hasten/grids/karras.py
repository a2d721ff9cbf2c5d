"""Even in a root of sigma / alpha."""

from __future__ import annotations

from math import exp, log
from typing import Annotated

import torch
from pydantic import Field

from hasten.grids.ends import laid
from hasten.path import Path


def karras(
    path: Path, steps: int, *,
    rho: Annotated[float, Field(ge=1, le=20)] = 7.0,
    smallest: Annotated[float, Field(gt=0, le=0.5, json_schema_extra={"log": True, "low": 0.002})] = 0.02,
) -> list[float]:  # fmt: skip
    """From t = 1 even in (sigma / alpha)^(1 / rho), down to `smallest`, then 0. Karras et al. 2022, arXiv:2206.00364
    eq. 5.

    Where the path's end is pure noise its sigma / alpha is taken as 50, and the end itself stands in that place.
    """

    def knots(start: float, stop: float, count: int) -> torch.Tensor:
        return -rho * torch.linspace(exp(-start / rho), exp(-stop / rho), count, dtype=torch.float64).log()

    return laid(path, steps, knots, -log(50.0), -log(smallest))
