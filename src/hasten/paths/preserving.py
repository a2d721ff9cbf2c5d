"""Variance preserving, beta linear in time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Preserving:
    """Variance preserving with linear beta: log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2. Song et al. 2020,
    arXiv:2011.13456 eq. 33; its inverse is Lu et al. 2022, arXiv:2206.00927, appendix."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Tensor) -> Tensor:
        """Log of the signal's share at t."""
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def time(self, lam: Tensor) -> Tensor:
        minus_log_alpha2 = torch.nn.functional.softplus(-2 * lam)
        rise = self.beta_max - self.beta_min
        return 2 * minus_log_alpha2 / (torch.sqrt(self.beta_min**2 + 2 * rise * minus_log_alpha2) + self.beta_min)
