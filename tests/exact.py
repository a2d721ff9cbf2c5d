"""Where a law's probability flow leads, exactly, and grids to measure solvers on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.reference.laws import Gaussian, Mixture


def spaced(path: Path, steps: int, even: str, start: float = -0.7, stop: float = 0.5) -> Grid:
    """From lam = `start` to `stop`: for exponential integrators the same problem on every path."""
    ends = torch.tensor([start, stop], dtype=torch.float64)
    along = torch.linspace(0, 1, steps + 1, dtype=torch.float64)

    def between(of: Tensor) -> Tensor:
        return of[0] + (of[1] - of[0]) * along

    match even:
        case "lam":
            times = path.time(between(ends))
        case "start":
            along = along**3
            times = path.time(between(ends))
        case "sigma":
            times = path.time(-between((-ends).exp()).log())
        case "t":
            times = between(path.time(ends))
        case _:
            raise ValueError(f"even = {even!r} is no spacing: lam, start, sigma or t")
    return at(path, times.tolist())


def flown(law: Gaussian | Mixture, x: Tensor, now: Node, after: Node) -> Tensor:
    """Where the probability-flow ODE takes x, exactly: each element is on its own, and in one dimension a flow that
    keeps the density keeps the share of the law on either side."""
    if isinstance(law, Gaussian):
        return law.flow(x, now, after)
    means, weights = torch.tensor(law.means).to(x), torch.tensor(law.weights).to(x)

    def share(x: Tensor, n: Node) -> Tensor:
        scale = (law.var * n.alpha**2 + n.sigma**2) ** 0.5
        return (weights * torch.special.ndtr(side[:, None] * (x[:, None] - n.alpha * means) / scale)).sum(-1)

    side = torch.ones_like(x)
    side = torch.where(share(x, now) < 0.5, 1.0, -1.0).to(x)  # of the tail that holds x, which loses no digits
    want, low, high = share(x, now), torch.full_like(x, -50), torch.full_like(x, 50)
    for _ in range(60):
        middle = (low + high) / 2
        above = (share(middle, after) - want) * side > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def slope(error: Callable[[int], float]) -> float:
    """How fast `error` falls with the steps: the slope of its logarithm from 64 to 128 and from there to 256, carried
    on to infinitely many, as slopes approach their limit like 1 / steps."""
    logs = torch.tensor([error(64), error(128), error(256)], dtype=torch.float64).log2()
    first, second = (-logs.diff()).tolist()
    return 2 * second - first


def distance(one: Tensor, other: Tensor) -> float:
    """Root of the mean square of the difference."""
    return float((one - other).square().mean().sqrt())
