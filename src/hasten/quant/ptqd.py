"""What quantization adds to a network's answer, told apart: a part that goes with the answer, a shift, and noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Of one step: said = (1 + k) eps + mean + noise. He et al. 2023, PTQD, arXiv:2305.10657 sec. 3.

    Attributes:
        k: least-squares slope of said - eps on eps, not below 0.
        mean: [C] of what is left.
        deviation: of what is left then.
    """

    k: float
    mean: Tensor
    deviation: float

    @classmethod
    def measured(cls, exact: Tensor, said: Tensor) -> Noise:
        """From both networks' answers to the same states, [B, C, ...]: guided, where the pipeline guides.

        Raises:
            ValueError: another shape, or answers that are not finite.
        """
        if exact.shape != said.shape or not bool(torch.isfinite(exact).all() & torch.isfinite(said).all()):
            raise ValueError(f"two finite answers of one shape are needed, not {[*exact.shape]} and {[*said.shape]}")
        a, d = exact.double(), said.double() - exact.double()
        own = a - a.mean()
        k = max(0.0, float((own * (d - d.mean())).sum() / own.square().sum().clamp_min(1e-30)))
        left = d - k * a
        mean = left.transpose(0, 1).flatten(1).mean(1)
        spread = (left.transpose(0, 1).flatten(1) - mean[:, None]).square().mean().sqrt()
        return cls(k, mean.float(), float(spread))

    def corrected(self, said: Tensor) -> Tensor:
        """eps, with noise of deviation `left()`."""
        return (said - self.mean.to(said).view(-1, *[1] * (said.ndim - 2))) / (1 + self.k)

    def left(self) -> float:
        """Deviation of the noise in `corrected`."""
        return self.deviation / (1 + self.k)


def spared(variance: float, slope: float, left: float) -> float:
    """The variance of the noise that a stochastic step still adds: of its own, what the network's noise brings is taken
    off, and never more than there is.

    Args:
        variance: sigma_t^2 of the step.
        slope: of the new state in the network's answer.
        left: deviation of the network's noise.
    """
    return max(0.0, variance - (slope * left) ** 2)


def slope_ddim(alpha_bar: float, alpha_bar_next: float, variance: float) -> float:
    """Of DDIM's step in eps: sqrt(1 - a' - s^2) - sqrt(a' (1 - a) / a). The first part keeps the step's own variance
    s^2, as the derivation has it, also where less noise is then added."""
    return (1 - alpha_bar_next - variance) ** 0.5 - (alpha_bar_next * (1 - alpha_bar) / alpha_bar) ** 0.5
