"""A path whose times are pushed towards noise or data."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from torch import Tensor

from hasten.path import Path


@dataclass(frozen=True, slots=True)
class Shifted:
    """`base` under t -> s t / (1 + (s - 1) t): on the straight line it takes log s from lam. Esser et al. 2024,
    arXiv:2403.03206 eq. 23.

    A network that is told the shifted time is on `base` (and samples with the grid `shifted`); one that is told the
    even time is on this path.

    Attributes:
        shift: s; above 1 more of the times are noisy, 1 changes nothing.
    """

    base: Path
    shift: float = 3.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift must be above 0, got {self.shift}; 1 changes nothing")

    def _moved(self, t: Tensor) -> Tensor:
        return t / (t + (1 - t) / self.shift)

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(self._moved(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.base.sigma(self._moved(t))

    def time(self, lam: Tensor) -> Tensor:
        moved = self.base.time(lam)
        return moved / (moved + (1 - moved) * self.shift)


def shift_of(
    tokens: float, base_shift: float = 0.5, max_shift: float = 1.15, base_tokens: int = 256, max_tokens: int = 4096
) -> float:
    """The shift that goes with a picture's size: exp(mu), mu linear in the number of tokens, `base_shift` at
    `base_tokens` and `max_shift` at `max_tokens`. As Flux and SD3 are sampled (Esser et al. 2024, arXiv:2403.03206 sec.
    5.3.2 has the root of the ratio of tokens)."""
    share = (tokens - base_tokens) / (max_tokens - base_tokens)
    return exp(base_shift + share * (max_shift - base_shift))
