"""Predictor-corrector sampling: a step of the reverse SDE, then Langevin steps where it has come to."""

from __future__ import annotations

from math import exp, sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid
from hasten.solvers.declare import Steps, solver


@solver(
    order=lambda corrections, **_: 0 if corrections else 1,
    calls=lambda corrections, **_: 1 + corrections,
    stochastic=True,
    systems=("score-sde",),
)
def predictor_corrector(
    x: Tensor, grid: Grid, noise: Noise, *,
    corrections: Annotated[int, Field(ge=0, le=4)] = 1,
    snr: Annotated[float, Field(gt=0, le=0.5)] = 0.16,
) -> Steps:  # fmt: skip
    """The reverse-diffusion predictor, then `corrections` Langevin steps x + s score + sqrt(2 s) z of size s = 2 (snr
    |z| / |score|)^2. Song et al. 2020, arXiv:2011.13456 eq. 46, alg. 4 and 5.

    The predictor turns the forward transition x = a x' + sqrt(b) z of this very step around, x' = (2 - a) x + b score +
    sqrt(b) z, which is alg. 2's on an exploding path (a = 1) and alg. 3's on a preserving one (a^2 + b = 1). From pure
    noise (a = 0) that would double the variance: there x0 is held, as in `ddpm`. Norms are each sample's own, not a
    batch's mean, so no sample depends on its neighbours. The factor alpha_i of alg. 5, between 0.98 and 1, is left out:
    without it the step is the same on every path.

    Without corrections it has strong order 1. With them no order is claimed: the corrector's bias is of size snr^2
    whatever the number of steps. It ends clean without one.

    Args:
        corrections: Langevin steps a step, a call each.
        snr: their signal-to-noise ratio, r of alg. 4 and 5.
    """
    for now, after in grid.steps():
        p = yield x, now
        if after.clean:
            return p.mix(x0=after.alpha)
        start, stop = exp(2 * now.lam), exp(2 * after.lam)
        marks = [start + (stop - start) * i / (corrections + 1) for i in range(corrections + 2)]
        z = noise(marks[0], marks[1], x)
        if now.alpha == 0:
            x = p.mix(x0=after.alpha).add_(z, alpha=after.sigma)
        else:
            a = now.alpha / after.alpha
            b = now.sigma**2 - (a * after.sigma) ** 2
            x = p.mix(x=2 - a, eps=-b / now.sigma).add_(z, alpha=sqrt(b))
        for i in range(corrections):
            q = yield x, after
            z = noise(marks[i + 1], marks[i + 2], x)
            x = _langevin(q, after.sigma, z, snr)
    return x


def _langevin(p: Prediction, sigma: float, z: Tensor, snr: float) -> Tensor:
    """x + s score + sqrt(2 s) z, score = -eps / sigma. s is at most sigma^2, as Langevin's steps diverge beyond twice
    that: where a sample has few elements its norms may ask for more."""
    eps = p.eps
    root = snr * _norm(z) / _norm(eps).clamp_min(1e-30)  # sqrt(s / 2) / sigma
    root = root.clamp_max(sqrt(1 / 2))
    return p.x + 2 * sigma * root * (z - root * eps)


def _norm(x: Tensor) -> Tensor:
    """Of each sample; a state without more axes than the batch's is one sample."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)) or None, keepdim=True)
