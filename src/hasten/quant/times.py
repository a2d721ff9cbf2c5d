"""At which steps of a trajectory the calls are kept that a quantizer is calibrated on."""

from __future__ import annotations

from collections.abc import Callable

import torch

Times = Callable[[int, int, torch.Generator], list[int]]
"""(steps of the trajectory, how many, random numbers) -> steps, 0 the noisiest, rising."""


def even(steps: int, count: int, rng: torch.Generator) -> list[int]:
    """Evenly over the trajectory from its start, each equally often to one. Li et al. 2023, Q-Diffusion,
    arXiv:2302.04304 alg. 1: every so many steps, as many calls.

    >>> even(10, 5, torch.Generator())
    [0, 2, 4, 6, 8]
    """
    return [i * steps // count for i in range(count)]


def normal(mean: float = 0.4, deviation: float = 0.4) -> Times:
    """Times t of a normal distribution, as shares of the trajectory counted from the clean end, cut to it: more of the
    nearly clean states. Shang et al. 2022, PTQ4DM, arXiv:2211.15736 sec. 3.3.2 and alg. 1; 0.4 and 0.4 are those of
    the authors' code (the paper prints two other deviations, T / 2 and its root).
    """

    def drawn(steps: int, count: int, rng: torch.Generator) -> list[int]:
        shares = mean + deviation * torch.randn(count, generator=rng, dtype=torch.float64)
        from_clean = (shares * steps).floor().clamp(0, steps - 1).long()
        return sorted((steps - 1 - from_clean).tolist())

    return drawn
