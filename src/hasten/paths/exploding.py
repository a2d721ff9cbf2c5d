"""Noise is added, geometrically in time."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Exploding:
    """Variance exploding, alpha = 1, sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1). Song et al. 2020,
    arXiv:2011.13456 appendices B and C: sigma(t)^2 - sigma(0)^2 of a geometric sigma(t), so that t = 0 is clean.

    NCSN, and the paper where sigma_min is small, leave the -1 out.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma must rise from above 0, got {self.sigma_min} to {self.sigma_max}")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.sqrt(torch.expm1(2 * log(self.sigma_max / self.sigma_min) * t))

    def time(self, lam: Tensor) -> Tensor:
        variance = torch.exp(-2 * lam) / self.sigma_min**2
        return torch.log1p(variance) / (2 * log(self.sigma_max / self.sigma_min))
