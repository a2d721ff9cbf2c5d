"""Variance preserving, given by its log signal-to-noise ratio between two ends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.paths.interpolant import Curve, meets


@dataclass(frozen=True, slots=True)
class LogSNR:
    """alpha^2 = sigmoid(-gamma(t)), sigma^2 = sigmoid(gamma(t)), gamma = gamma_0 + (gamma_1 - gamma_0) shape(t), so
    that lam = -gamma / 2. Kingma et al. 2021, arXiv:2107.00630 sec. 3.1 and 3.2.

    It is not clean at t = 0: a sampler's last step ends in the law of x_0, the data with noise of standard deviation
    sigma(0) (0.0013 at the paper's gamma_0), and a grid's last time is met like any other. Whoever wants the mean of
    the data instead asks once more at t = 0, or samples on a clean path with `denoiser.on_path`.

    Attributes:
        gamma_0, gamma_1: at t = 0 and 1; the paper's for pictures in [-1, 1].
        shape: rises from 0 at t = 0 to 1 at t = 1; None is t itself. `hasten.paths.learned.Rising` learns one; its
            `fixed()` is given here.

    Raises:
        ValueError: gamma does not rise.
    """

    gamma_0: float = -13.3
    gamma_1: float = 5.0
    shape: Curve | None = None

    def __post_init__(self) -> None:
        if not bool((self.gamma(torch.linspace(0, 1, 257, dtype=torch.float64)).diff() > 0).all()):
            raise ValueError(f"gamma must rise with t, got {self.gamma_0} to {self.gamma_1} along {self.shape}")

    def gamma(self, t: Tensor) -> Tensor:
        """Minus the log of the signal-to-noise ratio at t."""
        return self.gamma_0 + (self.gamma_1 - self.gamma_0) * (t if self.shape is None else self.shape(t))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(-self.gamma(t)))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(self.gamma(t)))

    def time(self, lam: Tensor) -> Tensor:
        if self.shape is None:
            return (-2 * lam - self.gamma_0) / (self.gamma_1 - self.gamma_0)
        return meets(lambda t: -self.gamma(t) / 2, lam)
