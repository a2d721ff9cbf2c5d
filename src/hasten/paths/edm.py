"""Noise is added, evenly in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EDM:
    """Noise is added and nothing shrinks, alpha = 1, sigma = sigma_max t. Karras et al. 2022, arXiv:2206.00364 sec.
    3."""

    sigma_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def time(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam) / self.sigma_max
