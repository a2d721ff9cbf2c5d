"""Even steps of the log signal-to-noise ratio."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from hasten.path import Path, lam


def log_snr(
    path: Path, steps: int, *,
    low: Annotated[float, Field(ge=-8, le=0)] = -3.0,
    high: Annotated[float, Field(ge=1, le=8)] = 3.0,
) -> list[float]:  # fmt: skip
    """From t = 1, then even in lam = log(alpha / sigma) between `low` and `high`, then 0. Lu et al. 2022,
    arXiv:2206.00927 sec. 3.3. `low` is raised to the path's own lam at t = 1 where that is finite and above it."""
    first = float(lam(path, torch.tensor(1.0, dtype=torch.float64)))
    if steps == 1:
        return [1.0, 0.0]
    if steps == 2:
        return [1.0, float(path.time(torch.tensor((low + high) / 2, dtype=torch.float64))), 0.0]
    if first > low:  # starts at the path's end itself
        lams = torch.linspace(first, high, steps, dtype=torch.float64)[1:]
    else:
        lams = torch.linspace(low, high, steps - 1, dtype=torch.float64)
    return [1.0, *path.time(lams).tolist(), 0.0]
