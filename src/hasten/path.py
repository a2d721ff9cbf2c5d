"""How signal and noise mix: x_t = alpha(t) x0 + sigma(t) eps, t = 0 data, t = 1 noise, lam = log(alpha / sigma).

Every solver runs on every path; a path is two functions of time and the inverse of lam.
"""

from __future__ import annotations

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


def lam(path: Path, t: Tensor) -> Tensor:
    """Half the log signal-to-noise ratio, log(alpha / sigma); inf where clean, -inf where pure noise."""
    return torch.log(path.alpha(t)) - torch.log(path.sigma(t))
