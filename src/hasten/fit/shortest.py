"""The cheapest way of K jumps through the points of a fine grid, exactly, by dynamic programming; also where a jump's
cost depends on the point before it."""

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


def shortest_pairs(cost_MMM: Tensor, steps: int) -> list[int]:
    """As `shortest`, where the cost of a jump depends on the jump before it: the same recursion over pairs of points;
    O(K M^3).

    Args:
        cost_MMM: [M, M, M], of jumping from point i to point j > i after one from h < i; of the first jump, [0, 0, j].
        steps: K, from 1 to M - 1.

    Raises:
        ValueError: the points are too few for as many steps.
    """
    points = len(cost_MMM)
    if not 1 <= steps < points:
        raise ValueError(f"{points} points allow 1 to {points - 1} steps, {steps} were asked for; record more points")
    rising = torch.ones(points, points, dtype=torch.bool).triu(1)
    cost = cost_MMM.double().masked_fill(~(rising[:, :, None] & rising[None]), torch.inf)
    best = torch.full((points, points), torch.inf, dtype=torch.float64)  # of the last jump's two ends
    best[0] = cost_MMM[0, 0].double().masked_fill(~rising[0], torch.inf)
    came: list[Tensor] = []
    for _ in range(steps - 1):
        best, before = (best[:, :, None] + cost).min(0)
        came.append(before)
    way = [int(best[:, -1].argmin()), points - 1]
    for before in reversed(came):
        way.insert(0, int(before[way[0], way[1]]))
    return way
