"""Where a grid that is spaced in lam starts and stops on a path, whose ends may lie at any lam or at none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.path import Path, lam

Knots = Callable[[float, float, int], Tensor]
"""(from, to, how many) -> that many rising lam, the first and the last as given."""


def laid(
    path: Path, steps: int, knots: Knots, low: float, high: float, *, before: bool = False, after: bool = True
) -> list[float]:
    """[steps + 1] times: 1, those of `knots` from lam = `low` to `high`, and 0.

    Where the path itself starts above `low` or ends below `high`, the knots go from or to its own end.

    Args:
        before: the end at t = 1 stands before the first knot, not in its place, where the path starts below `low`.
        after: the end at t = 0 stands after the last knot, not in its place, where the path ends above `high`.

    Raises:
        ValueError: the path has no lam between `low` and `high`.
    """
    first, last = (float(lam(path, torch.tensor(t, dtype=torch.float64))) for t in (1.0, 0.0))
    start, stop = max(low, first), min(high, last)
    if not start < stop:
        raise ValueError(
            f"this grid lies between lam = {low:.3g} and {high:.3g}, and the path between {first:.3g} and {last:.3g}: "
            "give the grid other ends"
        )
    skipped = int(not (before and first < low))
    found = knots(start, stop, steps - 1 + skipped + int(not (after and last > high)))
    return [1.0, *path.time(found[skipped : skipped + steps - 1]).tolist(), 0.0]


def even(start: float, stop: float, count: int) -> Tensor:
    """Even in lam."""
    return torch.linspace(start, stop, count, dtype=torch.float64)
