"""Quantiles of a beta law."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.path import Path
from hasten.paths.interpolant import meets

TERMS = 30
"""Of the continued fraction: 1e-13 for a and b from 0.1 to 5."""


def beta(
    path: Path, steps: int, *,
    a: Annotated[float, Field(ge=0.1, le=5, json_schema_extra={"low": 0.3, "high": 2})] = 0.6,
    b: Annotated[float, Field(ge=0.1, le=5, json_schema_extra={"low": 0.3, "high": 2})] = 0.6,
) -> list[float]:  # fmt: skip
    """The times at which the distribution function of Beta(a, b) is 1, 1 - 1/N .. 0: below 1 both ends get small steps.
    Lee et al. 2024, arXiv:2407.12173; a = b = 1 is `uniform`."""
    return list(_quantiles(steps, a, b))


@lru_cache(maxsize=1024)
def _quantiles(steps: int, a: float, b: float) -> tuple[float, ...]:
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return tuple(meets(lambda t: 1 - distribution(t, a, b), shares).tolist())


def distribution(t: Tensor, first: float, second: float) -> Tensor:
    """P(T <= t) of Beta(first, second), the regularised incomplete beta function; t in [0, 1], float64. The continued
    fraction of Abramowitz & Stegun 26.5.8, from its far end, on the side of the mean where it converges."""
    far = t > (first + 1) / (first + second + 2)
    a, b = t.new_tensor(first), t.new_tensor(second)
    x, a, b = torch.where(far, 1 - t, t), torch.where(far, b, a), torch.where(far, a, b)
    tail = torch.ones_like(x)
    for n in range(TERMS, 0, -1):
        m = n // 2
        if n % 2:
            share = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            share = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        tail = 1 + share * x / tail
    log_front = torch.xlogy(a, x) + torch.xlogy(b, 1 - x) + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    found = torch.exp(log_front) / (a * tail)
    return torch.where(far, 1 - found, found)
