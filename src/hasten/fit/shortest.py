"""The cheapest way of K jumps through the points of a fine grid, exactly, by dynamic programming."""

from __future__ import annotations

import torch
from torch import Tensor


def shortest(cost_MM: Tensor, steps: int) -> list[int]:
    """The K + 1 indices, rising from 0 to the last point, whose jumps cost least in sum.

    Watson et al. 2021, arXiv:2106.03802 (there for terms of the ELBO); O(K M^2).

    Args:
        cost_MM: [M, M], of jumping from point i to point j > i; what stands elsewhere is not read.
        steps: K, from 1 to M - 1.

    Raises:
        ValueError: the points are too few for as many steps, or a cost is NaN.
    """
    points = len(cost_MM)
    if not 1 <= steps < points:
        raise ValueError(f"{points} points allow 1 to {points - 1} steps, {steps} were asked for; record more points")
    cost_MM = cost_MM.double().masked_fill(torch.ones_like(cost_MM, dtype=torch.bool).tril(), torch.inf)
    if bool(cost_MM.isnan().any()):
        raise ValueError("a cost between two points is NaN: the recorded trajectory is not finite")
    best_M = cost_MM[0]  # of reaching each point in one jump
    came: list[Tensor] = []
    for _ in range(steps - 1):
        best_M, before_M = (best_M[:, None] + cost_MM).min(0)
        came.append(before_M)
    way = [points - 1]
    for before_M in reversed(came):
        way.append(int(before_M[way[-1]]))
    return [0, *reversed(way)]
