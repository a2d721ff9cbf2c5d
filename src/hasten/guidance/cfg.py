"""Classifier-free guidance."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node

systems = ("cfg",)


def cfg(
    cond: Denoiser, uncond: Denoiser, *,
    scale: Annotated[float, Field(ge=0, le=100)] = 5.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoiser:  # fmt: skip
    """x0 and eps of u + scale (c - u) while t is in `interval`; the conditional prediction alone elsewhere, and at
    scale 1; the unconditional alone at scale 0.

    Ho & Salimans 2022, arXiv:2207.12598 eq. 6 (there w = scale - 1); interval: Kynkaanniemi et al. 2024,
    arXiv:2404.07724 eq. 6. Two network calls; one where a prediction stands alone.
    """

    def guided(x: Tensor, node: Node) -> Prediction:
        if scale == 1 or not interval[0] <= node.t <= interval[1]:
            return cond(x, node)
        if scale == 0:
            return uncond(x, node)
        c, u = cond(x, node), uncond(x, node)
        return Prediction(x, u.x0 + scale * (c.x0 - u.x0), u.eps + scale * (c.eps - u.eps), spread=c.spread)

    return guided
