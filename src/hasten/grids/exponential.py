"""Even in the log of sigma / alpha."""

from __future__ import annotations

from math import log
from typing import Annotated

from pydantic import Field

from hasten.grids.ends import even, laid
from hasten.path import Path


def exponential(
    path: Path, steps: int, *,
    largest: Annotated[float, Field(ge=2, le=1000, json_schema_extra={"log": True, "high": 200})] = 50.0,
    smallest: Annotated[float, Field(gt=0, le=0.5, json_schema_extra={"log": True, "low": 0.002})] = 0.02,
) -> list[float]:  # fmt: skip
    """From t = 1 even in log(sigma / alpha), down to `smallest`, then 0: each noise level is the same share of the one
    before. Karras et al. 2022, arXiv:2206.00364 eq. 5 as rho grows without bound; k-diffusion's "exponential".

    Where the path's end is noisier than `largest`, the end itself stands in that place; `log_snr` sets it apart.
    """
    return laid(path, steps, even, -log(largest), -log(smallest))
