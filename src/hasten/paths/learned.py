"""A noise schedule that learns: its ends, and its shape between them."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Rising(nn.Module):
    """A curve that rises from 0 at t = 0 to 1 at t = 1, whatever its weights. Kingma et al. 2021, arXiv:2107.00630,
    appendix: a straight line plus a network of one hidden layer, weights positive, scaled between its own ends.

    It starts near the straight line. Arithmetic is in the dtype of t.

    Attributes:
        width: hidden units; the paper has 1024.
    """

    def __init__(self, width: int = 64, rng: torch.Generator | None = None) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))
        self.into = nn.Parameter(torch.randn(width, generator=rng))
        self.bias = nn.Parameter(torch.randn(width, generator=rng))
        self.out = nn.Parameter(torch.randn(width, generator=rng) - 2)

    def forward(self, t: Tensor) -> Tensor:
        """t of any shape -> the same shape."""
        start, stop = self._raw(torch.zeros_like(t)), self._raw(torch.ones_like(t))
        return (self._raw(t) - start) / (stop - start)

    def fixed(self) -> Rising:
        """A copy that no longer learns, for a path."""
        return deepcopy(self).requires_grad_(False)

    def _raw(self, t: Tensor) -> Tensor:
        slope, into, bias, out = (p.to(t) for p in (self.slope, self.into, self.bias, self.out))
        hidden = torch.sigmoid(softplus(into) * (2 * t[..., None] - 1) * 4 + bias * 4)
        return softplus(slope) * t + (softplus(out) * hidden).mean(-1)


class Ends(nn.Module):
    """gamma at t = 0 and at t = 1, learnt; the second always above the first."""

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 5.0) -> None:
        super().__init__()
        if not gamma_1 > gamma_0:
            raise ValueError(f"gamma must rise, got {gamma_0} to {gamma_1}")
        self.start = nn.Parameter(torch.tensor(gamma_0))
        self.log_rise = nn.Parameter(torch.tensor(gamma_1 - gamma_0).log())

    def forward(self) -> tuple[Tensor, Tensor]:
        """(gamma_0, gamma_1), two scalars."""
        return self.start, self.start + self.log_rise.exp()
