"""Stochastic interpolants between any two laws: a network learns the velocity, another the noise."""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from hasten.objectives.objective import Batch, Nets, Phase
from hasten.paths.interpolant import Curve

systems: tuple[str, ...] = ("stochastic-interpolants",)


@dataclass(frozen=True, slots=True)
class Between:
    """x_t = alpha(t) x0 + beta(t) x1 + gamma(t) z: x0 at t = 0, x1 at t = 1, a standard normal z in between."""

    alpha: Curve
    beta: Curve
    gamma: Curve

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, beta, gamma) at t and their slopes, both [3, *t.shape]; t inside (0, 1)."""
        curves = (self.alpha, self.beta, self.gamma)
        both = [torch.func.jvp(f, (t,), (torch.ones_like(t),)) for f in curves]
        return torch.stack([v[0] for v in both]), torch.stack([v[1] for v in both])


def _root(t: Tensor) -> Tensor:
    return torch.sqrt(2 * t * (1 - t))


LINEAR = Between(lambda t: 1 - t, lambda t: t, _root)
TRIGONOMETRIC = Between(lambda t: torch.cos(pi / 2 * t), lambda t: torch.sin(pi / 2 * t), _root)
ENCODING_DECODING = Between(
    lambda t: torch.where(t < 0.5, torch.cos(pi * t) ** 2, 0 * t),
    lambda t: torch.where(t > 0.5, torch.cos(pi * t) ** 2, 0 * t),
    lambda t: torch.sin(pi * t) ** 2,
)
"""Albergo et al. 2023, arXiv:2303.08797 table 4; the last goes to pure noise half way, and back."""


@dataclass(frozen=True, slots=True)
class StochasticInterpolant:
    """Quadratic losses of the velocity b = E[d x_t / dt | x_t] and of the noise eta = E[z | x_t], whose score is -eta /
    gamma: E |b|^2 / 2 - x_t' b and E |eta|^2 / 2 - z eta. Albergo et al. 2023, arXiv:2303.08797 sec. 2.2.

    The velocity's is averaged over z and -z, which keeps its variance finite where gamma' is infinite (sec. 6 there).
    Both are least at the conditional means, where they are minus half their mean squares.
    """

    between: Between = LINEAR

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("velocity", "noise"), self.loss),)

    def loss(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Scalar, a mean over elements; batch["x0"] and batch["x1"] are [B, ...]; all else in the batch goes to
        nets["velocity"](x, t, **rest) and nets["noise"](x, t, **rest) by name."""
        rest = dict(batch)
        x0, x1 = rest.pop("x0"), rest.pop("x1")
        z = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        t = torch.rand(len(x0), generator=rng, device=rng.device).to(x0).clamp(1e-6, 1 - 1e-6)
        (a, b, g), (da, db, dg) = self.between.shares(t.reshape(-1, *[1] * (x0.ndim - 1)))
        eta = nets["noise"](a * x0 + b * x1 + g * z, t, **rest)
        total = 0.5 * eta.square() - z * eta
        for w in (z, -z):
            v = nets["velocity"](a * x0 + b * x1 + g * w, t, **rest)
            total = total + 0.5 * (0.5 * v.square() - (da * x0 + db * x1 + dg * w) * v)
        return total.mean()
