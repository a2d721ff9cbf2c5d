"""What a guidance costs: network calls, counted where they are made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node


@dataclass
class Counted:
    """A denoiser that counts how often it was asked. Put it round each network before a guidance, and read what a
    whole sample took: steps times calls is what guidance costs, whatever else it does.

    >>> from hasten.guidance.cfg import cfg
    >>> from hasten.reference.laws import Gaussian
    >>> cond, uncond = Counted(Gaussian(1.0).denoise), Counted(Gaussian().denoise)
    >>> guided = cfg(cond, uncond, scale=3.0)

    Attributes:
        calls: so far.
    """

    denoise: Denoiser
    calls: int = 0

    def __call__(self, x: Tensor, node: Node) -> Prediction:
        """As the denoiser itself."""
        self.calls += 1
        return self.denoise(x, node)
