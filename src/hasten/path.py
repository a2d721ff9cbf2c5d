"""How signal and noise mix: x_t = alpha(t) x0 + sigma(t) eps, t = 0 data, t = 1 noise, lam = log(alpha / sigma).

Every solver runs on every path; a path is two functions of time and the inverse of lam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Path(Protocol):
    """Noise grows with t: lam must fall."""

    def alpha(self, t: Tensor) -> Tensor:
        """Share of the signal at t in [0, 1]."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at t in [0, 1]."""
        ...

    def time(self, lam: Tensor) -> Tensor:
        """The t at which log(alpha / sigma) is lam; -inf and inf give the ends that have them."""
        ...


@dataclass(frozen=True, slots=True)
class Flow:
    """The straight line from data to noise, alpha = 1 - t, sigma = t. Liu et al. 2022, arXiv:2209.03003 eq. 1."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)


@dataclass(frozen=True, slots=True)
class Exploding:
    """Noise is added and nothing shrinks, alpha = 1, sigma = sigma_max t. Karras et al. 2022, arXiv:2206.00364 sec.
    3."""

    sigma_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def time(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam) / self.sigma_max


@dataclass(frozen=True, slots=True)
class Preserving:
    """Variance preserving with linear beta: log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2. Song et al. 2020,
    arXiv:2011.13456 eq. 33; its inverse is Lu et al. 2022, arXiv:2206.00927 appendix D.4."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def time(self, lam: Tensor) -> Tensor:
        minus_log_alpha2 = torch.nn.functional.softplus(-2 * lam)
        rise = self.beta_max - self.beta_min
        return 2 * minus_log_alpha2 / (torch.sqrt(self.beta_min**2 + 2 * rise * minus_log_alpha2) + self.beta_min)


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


def lam(path: Path, t: Tensor) -> Tensor:
    """Half the log signal-to-noise ratio, log(alpha / sigma); inf where clean, -inf where pure noise."""
    return torch.log(path.alpha(t)) - torch.log(path.sigma(t))
