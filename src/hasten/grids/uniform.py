"""Even times."""

from __future__ import annotations

from hasten.path import Path


def uniform(path: Path, steps: int) -> list[float]:
    """t = 1, 1 - 1/N .. 0: what flow models were sampled with first ("trailing", Lin et al. 2023, arXiv:2305.08891)."""
    return [1 - i / steps for i in range(steps + 1)]
