"""What the last residuals weigh in place of one that is not computed: least squares on those that were."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

RIDGE = 1e-6
"""Of the squares' sizes: two residuals that are alike share the weight."""


@dataclass
class Products:
    """Sums of the inner products of each step's residual with those of steps before it, over pictures and branches.

    Attributes:
        at: (step, one of it or of those before, another) -> sum.
    """

    at: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def add(self, step: int, residuals: dict[int, Tensor]) -> None:
        """One trajectory's residuals, flat and of one length, of `step` and of steps before it."""
        steps = sorted(residuals)
        rows = torch.stack([residuals[s] for s in steps]).float()
        gram = (rows @ rows.T).tolist()
        for a, i in enumerate(steps):
            for b, j in enumerate(steps):
                self.at[step, i, j] = self.at.get((step, i, j), 0.0) + gram[a][b]

    def mixed(self, step: int, *kept: int) -> tuple[tuple[float, ...], float] | None:
        """The weights of the residuals of the steps `kept`, the newest first, whose sum is nearest to that of `step`,
        and the square of what is left over the square that repeating the newest leaves; None where they were not
        measured together."""
        if any((step, i, j) not in self.at for i in kept for j in (*kept, step)):
            return None
        of = [[self.at[step, i, j] for j in kept] for i in kept]
        a, b = torch.tensor(of, dtype=torch.float64), [self.at[step, i, step] for i in kept]
        a = a + RIDGE * a.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
        w = torch.linalg.solve(a, torch.tensor(b, dtype=torch.float64)).tolist()
        left = self._off(step, dict(zip(kept, w, strict=True)))
        repeated = self._off(step, {kept[0]: 1.0})
        return tuple(w), left / repeated if repeated > 0 else 0.0

    def _off(self, step: int, weights: dict[int, float]) -> float:
        """|residual - weighted sum|^2."""
        square = self.at[step, step, step] - 2 * sum(w * self.at[step, i, step] for i, w in weights.items())
        square += sum(v * w * self.at[step, i, j] for i, v in weights.items() for j, w in weights.items())
        return max(square, 0.0)
