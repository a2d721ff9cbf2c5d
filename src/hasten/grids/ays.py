"""Align Your Steps: published noise levels."""

from __future__ import annotations

from math import log
from typing import Literal

from hasten.grids.ends import laid
from hasten.grids.table import along, stable_diffusion
from hasten.path import Path

SD15 = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0)
SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def ays(path: Path, steps: int, *, model: Literal["sd15", "sdxl", "svd"] = "sdxl") -> list[float]:
    """Levels that were optimised on a model for ten steps of a stochastic DPM-Solver++, log-linear between them for
    other numbers of steps, and 0 for the last. Sabour et al. 2024, arXiv:2404.14507, numbers from its authors' page:
    steps of Stable Diffusion's 1000, or sigma / alpha for the video model.

    On a path that does not reach as far, the part of the curve that it does reach.
    """
    lams = [-log(s) for s in SVD] if model == "svd" else stable_diffusion(SD15 if model == "sd15" else SDXL)
    return laid(path, steps, along(lams), lams[0], lams[-1], after=False)
