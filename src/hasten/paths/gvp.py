"""A quarter of a circle from data to noise."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GVP:
    """Variance preserving at even speed, alpha = cos(pi t / 2), sigma = sin(pi t / 2). Albergo & Vanden-Eijnden 2022,
    arXiv:2209.15571 eq. 5; "GVP" in Ma et al. 2024, arXiv:2401.08740."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(pi / 2 * (1 - t))  # a cosine that is 0 at t = 1 to the last bit

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(pi / 2 * t)

    def time(self, lam: Tensor) -> Tensor:
        return torch.atan(torch.exp(-lam)) * (2 / pi)
