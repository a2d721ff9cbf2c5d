"""Critically damped Langevin diffusion: noise enters a velocity, and reaches the picture through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

systems = ("cld",)


@dataclass(frozen=True, eq=False, slots=True)
class PhaseNode:
    """One time on a path of pairs u = (x, v): u_t = alpha u_0 + sigma eps, with matrices [2, 2], float64."""

    t: float
    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True, slots=True)
class CLD:
    """dx = beta v / M dt, dv = -beta x dt - Gamma beta v / M dt + sqrt(2 Gamma beta) dw with Gamma^2 = 4 M, the least
    damping that does not swing. Dockhorn et al. 2021, arXiv:2112.07068 eq. 5; pairs are stacked, [2, B, ...].

    A path whose alpha and sigma are matrices. In units where M = 1, and in the clock s = beta t / sqrt(M), it has no
    parameters: alpha = e^-s [[1 + s, s], [-s, 1 - s]], the law at rest is a standard normal, and the covariance of
    what noise adds is I - alpha alpha^T (its appendix).

    Attributes:
        beta: speed of the clock.
        mass: M, the variance of v at rest.
        gamma: v starts as N(0, gamma M).
        spread: variance of x0 that sigma counts in; 0 makes sigma that of one data point.
    """

    beta: float = 4.0
    mass: float = 0.25
    gamma: float = 0.04
    spread: float = 0.0

    def __post_init__(self) -> None:
        given = self.beta, self.mass, self.gamma, self.spread
        if not (min(given[:3]) > 0 and self.spread >= 0):
            raise ValueError(f"beta, mass and gamma must be above 0 and spread not below, got {given}")

    def alpha(self, t: Tensor) -> Tensor:
        """The mean's matrix at t [...], [..., 2, 2]."""
        mean, unit = _mean(self._clock(t)), _unit(self.mass, t)
        return unit[:, None] * mean / unit

    def noise(self, t: Tensor) -> Tensor:
        """Covariance of the noise that a time t adds to a point, [..., 2, 2]."""
        return self._scaled(_noise(self._clock(t)))

    def covariance(self, t: Tensor) -> Tensor:
        """Of u_t about its mean, with that of (x0, v0) = diag(spread, gamma M) carried along, [..., 2, 2]."""
        return self._scaled(self._spread(self._clock(t))[0])

    def sigma(self, t: Tensor) -> Tensor:
        """R [..., 2, 2], the root R R^T of the covariance along which eps is constant where the law is this Gaussian:
        dR/dt = F R + G G^T R^-T / 2. Zhang et al. 2022, arXiv:2206.05564 sec. 4.

        In closed form but for an angle: R = L O, with L Cholesky's factor where M = 1 and O a turn by theta. What is
        left of the equation is dO O^T = L^-1 (F + G G^T S^-1 / 2) L - L^-1 dL, whose upper right entry says dtheta/ds
        = -L_vv / L_xx.
        """
        s = self._clock(t)
        (xx, xv, vv), det = self._spread(s)[0].flatten(-2)[..., [0, 1, 3]].unbind(-1), self._spread(s)[1]
        root = xx.sqrt()
        low = torch.where(xx > 0, xv / root.clamp_min(1e-300), vv.sqrt())  # the limit at t = 0 of a point
        last = torch.where(xx > 0, (det / xx.clamp_min(1e-300)).sqrt(), torch.zeros_like(xx))
        theta = -self._turned(s)
        cos, sin = theta.cos(), theta.sin()
        rows = root * cos, -root * sin, low * cos + last * sin, -low * sin + last * cos
        factor = torch.stack(rows, -1).unflatten(-1, (2, 2))
        return _unit(self.mass, factor)[:, None] * factor

    def nodes(self, times: Sequence[float]) -> tuple[PhaseNode, ...]:
        """Nodes at these times in [0, 1], in float64. Raises ValueError for times outside."""
        if not all(0 <= t <= 1 for t in times):
            raise ValueError(f"times lie in [0, 1], 1 is noise; got {list(times)}")
        t = torch.tensor(list(times), dtype=torch.float64)
        return tuple(PhaseNode(*row) for row in zip(times, self.alpha(t), self.sigma(t), strict=True))

    def _clock(self, t: Tensor) -> Tensor:
        return self.beta / self.mass**0.5 * t

    def _scaled(self, covariance: Tensor) -> Tensor:
        unit = _unit(self.mass, covariance)
        return unit[:, None] * covariance * unit

    def _spread(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Covariance at clock s where M = 1, and its determinant, summed without cancelling."""
        mean, noise = _mean(s), _noise(s)
        start = torch.tensor([self.spread, self.gamma], dtype=s.dtype, device=s.device)
        carried = mean * start @ mean.mT
        (a, b, _, d), (p, q, _, r) = carried.flatten(-2).unbind(-1), noise.flatten(-2).unbind(-1)
        det = torch.exp(-4 * s) * self.spread * self.gamma + (p * r - q * q) + (a * r + d * p - 2 * b * q)
        return carried + noise, det

    def _turned(self, s: Tensor) -> Tensor:
        """The integral of L_vv / L_xx = sqrt(det) / xx over the clock, by Gauss-Legendre in its root: where the data is
        a point it starts as s^(-1/2)."""
        place, weight = (torch.from_numpy(v).to(s) for v in _rule())
        q = s.sqrt()[..., None] * (1 + place) / 2
        covariance, det = self._spread(q * q)
        rate = det.sqrt() / covariance[..., 0, 0].clamp_min(1e-300)
        return s.sqrt() / 2 * (weight * 2 * q * rate).sum(-1)


@cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(96)


def _unit(mass: float, like: Tensor) -> Tensor:
    """What (x, v) are measured in, [2]."""
    return torch.tensor([1.0, mass**0.5], dtype=like.dtype, device=like.device)


def _mean(s: Tensor) -> Tensor:
    """exp(s [[0, 1], [-1, -2]])."""
    return torch.stack([1 + s, s, -s, 1 - s], -1).unflatten(-1, (2, 2)) * torch.exp(-s)[..., None, None]


def _noise(s: Tensor) -> Tensor:
    """4 times the integral of the outer square of mean's last column: I - mean mean^T, without cancelling."""
    decay = torch.exp(-2 * s)
    xx = torch.special.gammainc(torch.full_like(s, 3.0), 2 * s)  # 1 - e^-2s (1 + 2s + 2s^2)
    xv, vv = 2 * s * s * decay, -torch.expm1(-2 * s) + 2 * s * (1 - s) * decay
    return torch.stack([xx, xv, xv, vv], -1).unflatten(-1, (2, 2))
