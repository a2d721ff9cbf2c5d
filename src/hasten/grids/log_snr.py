"""Even steps of the log signal-to-noise ratio."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hasten.grids.ends import even, laid
from hasten.path import Path


def log_snr(
    path: Path, steps: int, *,
    low: Annotated[float, Field(ge=-8, le=0)] = -3.0,
    high: Annotated[float, Field(ge=1, le=8)] = 3.0,
) -> list[float]:  # fmt: skip
    """From t = 1, then even in lam = log(alpha / sigma) between `low` and `high`, then 0. Lu et al. 2022,
    arXiv:2206.00927 sec. 3.3. `low` is raised to the path's own lam at t = 1 where that is above it, `high` lowered to
    that at t = 0. With two steps the one time between is half way."""
    if steps == 2:
        return laid(path, 2, lambda start, stop, _: even(start, stop, 3), low, high, after=False)
    return laid(path, steps, even, low, high, before=True)
