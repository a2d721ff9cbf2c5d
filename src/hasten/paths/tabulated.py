"""Variance preserving, from a table of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tabulated:
    """Variance preserving, log alpha given at t = 1/N, 2/N .. 1 and linear between; t = 0 is clean.

    Discrete models (Stable Diffusion's scaled-linear betas) are this: their step i is t = (i + 1) / N.

    Attributes:
        alpha_bar: alpha^2 at the N steps, falling, in (0, 1); a zero (zero terminal SNR) may stand last.
    """

    alpha_bar: Sequence[float]
    _log_alpha: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bar = torch.tensor([1.0, *self.alpha_bar], dtype=torch.float64).clamp_min(1e-12)
        if not bool((bar.diff() < 0).all()):
            raise ValueError("alpha_bar must fall from below 1; give the cumulative product of 1 - beta")
        object.__setattr__(self, "_log_alpha", bar.log() / 2)

    def _interpolate(self, t: Tensor) -> Tensor:
        table = self._log_alpha.to(t)
        place = t * (len(table) - 1)
        low = place.detach().long().clamp(0, len(table) - 2)
        return table[low] + (place - low) * (table[low + 1] - table[low])

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._interpolate(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._interpolate(t)))

    def time(self, lam: Tensor) -> Tensor:
        log_alpha = -torch.nn.functional.softplus(-2 * lam) / 2
        table = self._log_alpha.to(lam)
        high = torch.searchsorted(-table, -log_alpha).clamp(1, len(table) - 1)
        share = (log_alpha - table[high - 1]) / (table[high] - table[high - 1])
        return (high - 1 + share) / (len(table) - 1)
