"""What a long step of DDIM costs, between every two points of a fine trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.fit.trajectory import Trajectory


def curvature(exact: Trajectory) -> Tensor:
    """[M + 1, M + 1]: the mean distance, over the state's norm, between the exact state at node j and what one step of
    DDIM from the exact state at node i makes; the trajectory is all that is needed, no further call.

    The cost of Chen et al. 2024, arXiv:2405.11326 sec. 5 (GITS); `shortest` finds the grid of K steps that sums least.
    """
    nodes, states = exact.grid.nodes, exact.x.flatten(2)
    scale = states[-1].norm(dim=-1)
    cost = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for i in range(len(exact.x0)):
        x0, eps = exact.x0[i].flatten(1), exact.eps[i].flatten(1)
        for j in range(i + 1, len(nodes)):
            there = nodes[j].alpha * x0 + nodes[j].sigma * eps
            cost[i, j] = ((there - states[j]).norm(dim=-1) / scale).mean()
    return cost
