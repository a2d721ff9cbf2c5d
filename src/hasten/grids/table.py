"""Grids that others found, as data: a curve through their lam."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hasten.grids.ends import Knots
from hasten.path import lam
from hasten.paths.discrete import scaled_linear


def along(lams: Sequence[float]) -> Knots:
    """Knots on the line through rising lams that stand at even places: their own where as many are asked for from end
    to end."""
    places = np.linspace(0, 1, len(lams))

    def knots(start: float, stop: float, count: int) -> Tensor:
        first, last = np.interp([start, stop], lams, places).tolist()
        return torch.from_numpy(np.interp(np.linspace(first, last, count), places, lams))

    return knots


def stable_diffusion(steps: Sequence[float]) -> list[float]:
    """lam at steps 0 .. 999 of Stable Diffusion's noise, in the order given; between steps log alpha is linear."""
    t = (torch.tensor(list(steps), dtype=torch.float64) + 1) / 1000
    return lam(scaled_linear(), t).tolist()
