"""Whether each weight is rounded up or down, learned by what its layer or block then says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hasten.format import Codes, Format, grouped

ZETA, GAMMA = 1.1, -0.1
"""The stretch of the sigmoid, so that 0 and 1 are reached (Nagel et al. 2020, sec. 3.2)."""


class Rounding(nn.Module):
    """Weights between the code below and the one above, by h = clip(1.2 sigmoid(V) - 0.1, 0, 1); at first where they
    are. Nagel et al. 2020, arXiv:2004.10568 eq. 22 and 23.

    Args:
        w_OI: the weights, [O, I].
        format: integers; their scales stay.
    """

    floor: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, w_OI: Tensor, format: Format, scale: Tensor, zero: Tensor | None = None) -> None:
        super().__init__()
        self.format, self.inputs = format, w_OI.shape[1]
        places = grouped(w_OI.double(), format.share) / scale.double()
        self.register_buffer("floor", places.floor().float())
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero", None if zero is None else zero.float())
        share = ((places - places.floor()).clamp(1e-4, 1 - 1e-4) - GAMMA) / (ZETA - GAMMA)
        self.v = nn.Parameter(torch.logit(share).float())

    def up(self) -> Tensor:
        """h, how much of the step up each weight takes."""
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        """[O, I], differentiable in V."""
        return self._at(self.up())

    def undecided(self, beta: float) -> Tensor:
        """Sum of 1 - |2 h - 1|^beta (its eq. 24): zero where every weight has chosen."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def codes(self) -> Codes:
        """The choice."""
        codes = self._clipped(self.floor + (self.v >= 0)).flatten(-2)
        if self.format.share == "tensor":
            codes = codes.reshape(-1, self.inputs)
        kind = torch.int8 if self.zero is None else torch.uint8
        return Codes(self.format, codes[..., : self.inputs].to(kind), self.scale, self.zero)

    def _clipped(self, places: Tensor) -> Tensor:
        if self.zero is not None:
            return (places + self.zero).clamp(0, self.format.most)
        return places.clamp(-self.format.most, self.format.most)

    def _at(self, up: Tensor) -> Tensor:
        codes = self._clipped(self.floor + up)
        flat = ((codes if self.zero is None else codes - self.zero) * self.scale).flatten(-2)
        return flat.reshape(-1, self.inputs) if self.format.share == "tensor" else flat[..., : self.inputs]


def beta(step: int, steps: int, warm: float = 0.2, high: float = 20.0, low: float = 2.0) -> float | None:
    """The exponent of `undecided`, falling in a line from `high` to `low` after `warm` of the steps; None before, where
    the weights are free (Li et al. 2021, BRECQ, arXiv:2102.05426 app. B)."""
    share = (step / steps - warm) / (1 - warm)
    return None if share < 0 else low + (high - low) * (1 - share)
