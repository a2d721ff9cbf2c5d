"""Even in a root of sigma / alpha."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from hasten.path import Path, lam


def karras(
    path: Path, steps: int, *,
    rho: Annotated[float, Field(ge=1, le=20)] = 7.0,
    smallest: Annotated[float, Field(gt=0, le=0.5, json_schema_extra={"log": True, "low": 0.002})] = 0.02,
) -> list[float]:  # fmt: skip
    """From t = 1 even in (sigma / alpha)^(1 / rho), down to `smallest`, then 0. Karras et al. 2022, arXiv:2206.00364
    eq. 5.

    Where the path's end is pure noise its sigma / alpha is taken as 50, and the end itself stands in that place.
    """
    largest = min(50.0, float(torch.exp(-lam(path, torch.tensor(1.0, dtype=torch.float64)))))
    if steps == 1:
        return [1.0, 0.0]
    ramp = torch.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps, dtype=torch.float64) ** rho
    return [1.0, *path.time(-ramp[1:].log()).tolist(), 0.0]
