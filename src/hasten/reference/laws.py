"""Laws whose denoiser is known exactly: what solvers, guidance and objectives are tested on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.denoiser import Prediction
from hasten.grid import Node


@dataclass(frozen=True, slots=True)
class Gaussian:
    """x0 ~ N(mean, var), each element on its own. Its denoiser is linear in x, and its flow is known."""

    mean: float = 0.7
    var: float = 0.25

    def denoise(self, x: Tensor, n: Node) -> Prediction:
        """E[x0 | x] and the eps that goes with it; x [B, ...], any node with noise."""
        gain = self.var * n.alpha / (self.var * n.alpha**2 + n.sigma**2)
        x0 = self.mean + gain * (x - n.alpha * self.mean)
        return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)

    def flow(self, x: Tensor, now: Node, after: Node) -> Tensor:
        """Where the probability-flow ODE takes x from `now` to `after`: deviations scale with the standard
        deviation."""

        def deviation(n: Node) -> float:
            return (self.var * n.alpha**2 + n.sigma**2) ** 0.5

        return after.alpha * self.mean + (x - now.alpha * self.mean) * deviation(after) / deviation(now)


@dataclass(frozen=True)
class Mixture:
    """x0 ~ sum_k weight_k N(mean_k, var), each element on its own. Its denoiser bends, so it shows errors that a
    Gaussian hides."""

    means: tuple[float, ...] = (-1.0, 0.5, 1.5)
    weights: tuple[float, ...] = (0.3, 0.5, 0.2)
    var: float = 0.1

    def denoise(self, x: Tensor, n: Node) -> Prediction:
        """E[x0 | x] by the posterior over the parts."""
        means, weights = torch.tensor(self.means).to(x), torch.tensor(self.weights).to(x)
        spread = self.var * n.alpha**2 + n.sigma**2
        off = x[..., None] - n.alpha * means
        part = torch.softmax(weights.log() - off**2 / (2 * spread), -1)
        x0 = (part * (means + self.var * n.alpha / spread * off)).sum(-1)
        return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)

    def sample(self, size: int, rng: torch.Generator) -> Tensor:
        """[size] draws."""
        which = torch.multinomial(torch.tensor(self.weights), size, True, generator=rng)
        return torch.tensor(self.means)[which] + self.var**0.5 * torch.randn(size, generator=rng)
