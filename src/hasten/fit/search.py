"""A search without gradients over the inner times of a grid."""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import torch
from torch import Tensor


def refined(
    loss: Callable[[list[float]], float], times: list[float], rounds: int, rng: torch.Generator, spread: float = 0.25
) -> tuple[list[float], float]:
    """The best times found by a (1+1) evolution strategy on the logarithms of the gaps, and their loss.

    Both ends stay. The spread grows after a success and shrinks after a failure so that a fifth of the tries succeed
    (Beyer & Schwefel 2002, doi:10.1023/A:1015059928466).

    Args:
        loss: of falling times; infinite or NaN is taken as a failure.
    """
    best, gaps = loss(times), -torch.tensor(times, dtype=torch.float64).diff()
    for _ in range(rounds):
        tried = gaps * (spread * torch.randn(gaps.shape, generator=rng, dtype=torch.float64)).exp()
        tried = tried * (times[0] - times[-1]) / tried.sum()
        value = loss(laid(tried, times[0], times[-1]))
        if value < best:
            best, gaps, spread = value, tried, spread * exp(0.8 / 3)
        else:
            spread *= exp(-0.2 / 3)
    return laid(gaps, times[0], times[-1]), best


def laid(gaps: Tensor, first: float, last: float) -> list[float]:
    """Times from `first` to `last` exactly, with these gaps."""
    inner = (first - gaps.cumsum(0))[:-1]
    return [first, *inner.tolist(), last]
