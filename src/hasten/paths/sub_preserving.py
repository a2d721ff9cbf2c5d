"""Less noise than variance preserving, at the same signal."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.paths.preserving import Preserving


@dataclass(frozen=True, slots=True)
class SubPreserving:
    """The sub-VP path: the signal of a variance preserving one, and sigma = 1 - alpha^2, its variance. Song et al.
    2020, arXiv:2011.13456 appendix B.

    Its lam from that of `base`: e^-lam = (1 - alpha^2) / alpha is a quadratic in alpha, so log alpha = -asinh(e^-lam /
    2), and sigma is the square of the base's, so that base is met at (lam + log alpha) / 2.
    """

    base: Preserving = field(default_factory=Preserving)

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self.base.log_alpha(t))

    def time(self, lam: Tensor) -> Tensor:
        return self.base.time((lam - torch.asinh(torch.exp(-lam) / 2)) / 2)
