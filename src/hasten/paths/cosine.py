"""Variance preserving, signal along a cosine."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Cosine:
    """Variance preserving with alpha(t) = f(t) / f(0), f(t) = cos(pi/2 (t + s) / (1 + s)), pure noise at t = 1. Nichol
    & Dhariwal 2021, arXiv:2102.09672 eq. 17 (their alpha_bar is alpha^2); in steps, with the clip of beta at 0.999, it
    is `hasten.paths.discrete.cosine`.

    With a = pi/2 / (1 + s), f(t) is sin(a (1 - t)), and sin^2 p - sin^2 q = sin(p - q) sin(p + q) gives a sigma that
    loses no digits.

    Attributes:
        s: keeps beta from being too small at t = 0; the paper's is 0.008.
    """

    s: float = 0.008

    @property
    def _a(self) -> float:
        return pi / 2 / (1 + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._a * (1 - t)) / sin(self._a)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sin(self._a * t) * torch.sin(self._a * (2 - t))) / sin(self._a)

    def time(self, lam: Tensor) -> Tensor:
        signal = torch.sqrt(torch.sigmoid(2 * lam)) * sin(self._a)
        rest = torch.sqrt(cos(self._a) ** 2 + sin(self._a) ** 2 * torch.sigmoid(-2 * lam))
        return (1 - torch.atan2(signal, rest) / self._a).clamp_min(0)
