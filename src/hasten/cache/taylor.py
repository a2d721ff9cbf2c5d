"""TaylorSeer: between key steps the blocks' residual is forecast, not repeated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from hasten.anatomy import anatomy
from hasten.cache.residual import Kept, combined, reuse
from hasten.method import Method, Part, Stage
from hasten.moment import Moment
from hasten.patch import Patch


class Taylor(Method):
    """Runs the blocks every `every` steps; in between adds the residual that the Taylor sum of degree `order` around
    the last key step forecasts, its derivatives from differences of the last order + 1 key steps. Order 0 is
    cache.interval; every = 1 changes nothing. Keeps order + 1 residuals a chain of blocks and branch.

    Liu et al. 2025 (TaylorSeer), arXiv:2503.06923 sec. 3.3, on the residual of a chain of blocks instead of each
    attention and feed-forward. Its differences, all taken backwards by one distance, forecast exactly what is linear
    in the step; those here, which know how far apart key steps lay, also what is quadratic. While fewer key steps have
    run than the order needs, the degree is lower.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"every": 1}

    every: int = Field(3, ge=1, le=10)
    order: int = Field(1, ge=0, le=2)

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            if self.every > 1:
                for chain in anatomy(model).chains:
                    reuse(patch, chain, self._between, forecast, self.order + 1)
            return patch.keep()

    def _between(self, here: Moment) -> bool:
        return here.step % self.every != 0


def forecast(history: tuple[Kept, ...], here: Moment) -> Kept:
    """The residual at `here` from those of key steps, the newest first."""
    if len(history) == 1:
        return history[0]
    return combined(weights([k.moment.step for k in history], here.step), history)


def weights(steps: Sequence[float], at: float) -> list[float]:
    """What each feature weighs in the forecast at step `at` from features at `steps`, all different.

    The Taylor sum of a polynomial of degree n around one point is the polynomial, and differences of features at n + 1
    steps are those of the one polynomial through them: the sum is Lagrange's, sum_i F_i prod_j (at - s_j) / (s_i -
    s_j). So every polynomial of degree len(steps) - 1 is forecast exactly, however the steps lie.
    """
    found = []
    for i, s in enumerate(steps):
        w = 1.0
        for j, other in enumerate(steps):
            w *= (at - other) / (s - other) if j != i else 1.0
        found.append(w)
    return found
