"""The adaptive solver of the reverse SDE, with a step size for each sample."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import exp, isnan, log, sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, nodes
from hasten.path import Path
from hasten.solvers.declare import BatchSteps, Many, solver

NOISIEST, CLEANEST = 100.0, 0.01  # sigma / alpha between which it runs where the grid ends at pure noise, or clean
SAFETY, POWER, FIRST, SHORTEST = 0.9, 0.9, 0.01, 1e-8  # theta, r, h_init of algorithm 1; steps below are refused


@solver(order=0, calls=2, stochastic=True, adaptive=True, asks="batches", systems=("gotta-go-fast",))
def gotta_go_fast(
    x: Tensor, grid: Grid, noise: Noise, *,
    rtol: Annotated[float, Field(gt=0, le=1)] = 0.05,
    atol: Annotated[float, Field(gt=0, le=1)] = 0.0078,
) -> BatchSteps:  # fmt: skip
    """Two calls an attempt, at the grid's ends alone: Euler-Maruyama x', then stochastic improved Euler x'' with the
    same noise; x'' is kept where (x'' - x') / max(atol, rtol |x'|, rtol |x'_before|) has a root mean square over a
    sample of 1 or less. Jolicoeur-Martineau et al. 2021, arXiv:2105.14080.

    Each sample has its own time and step. A question asks for all samples at once, in their order, each at its own
    node, so conditioning of the batch fits. A sample that has arrived is asked along: a batch costs what its slowest
    sample costs. Each attempt reads one number a sample from the device, and draws the batch's noise once a sample.

    Two departures: a rejected step is tried again on the same Brownian path, not with fresh noise, which would favour
    small increments; and from pure noise, where g is infinite, x0 is held down to sigma / alpha = 100. A grid that ends
    clean is run to sigma / alpha = 0.01, and the last answer's x0 is the sample (the paper's denoising step).

    Args:
        rtol, atol: relative and absolute tolerance; the paper's atol is two levels of 256 in [-1, 1].

    Raises:
        ValueError: a grid that was made of nodes alone.
    """
    if grid.path is None:
        raise ValueError("gotta_go_fast chooses its times on a path: make the grid with grid.at(path, times)")
    first, last = grid.nodes[0], grid.nodes[-1]
    low = first.lam if first.alpha else min(-log(NOISIEST), last.lam)
    high = max(-log(CLEANEST), first.lam) if last.clean else last.lam
    start, end = grid.met([low, high])
    if first.alpha == 0:
        p = yield from _asked(x, [first] * len(x))
        x = p.mix(x0=start.alpha).add_(noise(0.0, exp(2 * start.lam), x), alpha=start.sigma)
    at, h, before = [start] * len(x), [min(FIRST, start.t - end.t)] * len(x), x
    while any(h):
        ahead = _ahead(grid.path, at, h, end)
        z = _noise(noise, at, ahead, x)
        p = yield from _asked(x, at)
        one = _change(p, at, h, z)
        euler = p.x + one
        q = yield from _asked(euler, ahead)
        two = _change(q, ahead, h, z)
        allowed = (rtol * torch.maximum(euler.abs(), before.abs())).clamp_min(atol)
        errors = ((two - one) / (2 * allowed)).flatten(1).square().mean(1).sqrt().tolist()
        kept = [e <= 1 for e in errors]
        mask = _rows(kept, x) > 0
        x, before = torch.where(mask, p.x + (one + two) / 2, p.x), torch.where(mask, euler, before)
        at = [m if k else n for n, m, k in zip(at, ahead, kept, strict=True)]
        h = [min(n.t - end.t, _next(s, e)) for n, s, e in zip(at, h, errors, strict=True)]
    if last.clean:
        p = yield from _asked(x, at)
        return p.mix(x0=last.alpha)
    return x


def _asked(x: Tensor, at: Sequence[Node]) -> Generator[Many, list[Prediction], Prediction]:
    """Of every sample at its own node, from one question."""
    told = yield Many(x[:, None], tuple(at))
    return Prediction(torch.cat([p.x for p in told]), torch.cat([p.x0 for p in told]), torch.cat([p.eps for p in told]))


def _change(p: Prediction, at: Sequence[Node], h: Sequence[float], z: Tensor) -> Tensor:
    """Of the reverse SDE over steps h back in time, at fixed coefficients: eq. 6 of arXiv:2011.13456."""
    of_x0 = [-s * n.dalpha for n, s in zip(at, h, strict=True)]
    of_eps = [-s * (n.dsigma + n.diffusion / (2 * n.sigma)) for n, s in zip(at, h, strict=True)]
    of_z = [sqrt(s * n.diffusion) for n, s in zip(at, h, strict=True)]
    return _rows(of_x0, z) * p.x0 + _rows(of_eps, z) * p.eps + _rows(of_z, z) * z


def _ahead(path: Path, at: Sequence[Node], h: Sequence[float], end: Node) -> list[Node]:
    """Where the steps lead; exactly to the end where they reach it, so that a sample there stays."""
    found = nodes(path, [max(end.t, n.t - s) for n, s in zip(at, h, strict=True)])
    return [end if s >= n.t - end.t else m for n, s, m in zip(at, h, found, strict=True)]


def _noise(noise: Noise, at: Sequence[Node], ahead: Sequence[Node], x: Tensor) -> Tensor:
    """To each sample its row of one Brownian motion, between its own times."""
    rows = []
    for i, (n, m) in enumerate(zip(at, ahead, strict=True)):
        rows.append(torch.zeros_like(x[i]) if m is n else noise(exp(2 * n.lam), exp(2 * m.lam), x)[i])
    return torch.stack(rows)


def _next(h: float, error: float) -> float:
    """The step after one with this error."""
    grow = max(error, 1e-9) ** -POWER
    if isnan(error) or 0 < h * grow < SHORTEST:
        raise ValueError(f"a step of {h:.1e} errs by {error:.1e} times what is allowed: raise rtol, or look for NaN")
    return SAFETY * h * grow


def _rows(values: Sequence[float], like: Tensor) -> Tensor:
    """[B, 1 ..], one number a sample."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(-1, *[1] * (like.ndim - 1))
