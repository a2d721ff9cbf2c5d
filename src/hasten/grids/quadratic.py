"""Even in the root of the time."""

from __future__ import annotations

from hasten.path import Path


def quadratic(path: Path, steps: int) -> list[float]:
    """t = (1 - i / N)^2: small steps near the data. Song et al. 2020, arXiv:2010.02502, appendix."""
    return [(1 - i / steps) ** 2 for i in range(steps + 1)]
