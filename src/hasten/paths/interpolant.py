"""Any two functions of time as a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Interpolant:
    """x_t = alpha(t) x0 + sigma(t) eps with functions that are given: a one-sided stochastic interpolant. Albergo et
    al. 2023, arXiv:2303.08797 sec. 3.2; the inverse of lam is found by halving.

    An interpolant alpha x0 + beta x1 + gamma z whose x1 is Gaussian has the marginals of the path (alpha, sqrt(beta^2 +
    gamma^2)).

    Attributes:
        alpha, sigma: times of any shape in [0, 1] -> shares, [0] of noise at t = 0; alpha / sigma must fall.

    Raises:
        ValueError: lam does not fall.
    """

    alpha: Curve
    sigma: Curve

    def __post_init__(self) -> None:
        if not bool((self._lam(torch.linspace(0, 1, 257, dtype=torch.float64)).diff() < 0).all()):
            raise ValueError("alpha / sigma must fall from t = 0 to 1: on a path, noise grows with t")

    def _lam(self, t: Tensor) -> Tensor:
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def time(self, lam: Tensor) -> Tensor:
        return meets(self._lam, lam)


def meets(curve: Curve, values: Tensor) -> Tensor:
    """The t in [0, 1], of the shape of `values`, at which a falling curve takes them; NaN for those that it does not
    reach. By halving in float64, so the curve needs no slope, and may be infinite at its ends."""
    with torch.no_grad():
        wanted = values.double()
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        top, bottom = curve(low), curve(high)
        within = (wanted <= top + 1e-9 * (1 + top.abs())) & (wanted >= bottom - 1e-9 * (1 + bottom.abs()))
        for _ in range(64):
            middle = (low + high) / 2
            above = curve(middle) > wanted
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        found = torch.where(wanted >= top, 0.0, torch.where(wanted <= bottom, 1.0, (low + high) / 2))
        return torch.where(within, found, torch.nan).to(values)
