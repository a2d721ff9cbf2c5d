"""The straight line from data to noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Flow:
    """The straight line from data to noise, alpha = 1 - t, sigma = t. Liu et al. 2022, arXiv:2209.03003 eq. 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)
