"""A path whose noisy end is left out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.path import Path


@dataclass(frozen=True, slots=True)
class Cut:
    """`base` from data up to its time `last`, which is this path's t = 1: for networks that never saw what lies beyond.
    Times are scaled, so `last` = 1 changes nothing.

    Attributes:
        last: in (0, 1].
    """

    base: Path
    last: float

    def __post_init__(self) -> None:
        if not 0 < self.last <= 1:
            raise ValueError(f"the last time lies in (0, 1], got {self.last}; 1 leaves nothing out")

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(self.last * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.base.sigma(self.last * t)

    def time(self, lam: Tensor) -> Tensor:
        return self.base.time(lam) / self.last
