"""Densities along a flow: the instantaneous change of variables, and log p(x0) by the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from math import atan, cos, hypot, log, pi, sin, tan

import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.grid import at
from hasten.path import Path
from hasten.solvers.rk45 import angle, integrate

systems = ("score-sde", "neural-ode")

Flow = Callable[[float, Tensor], Tensor]
"""dy/ds at (s, y), y [B, ...], each row on its own."""


def transported(
    f: Flow, y: Tensor, start: float, stop: float, rtol: float = 1e-5, atol: float = 1e-5, probe: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y at `stop` of dy/ds = f(s, y), y [B, ...] at `start`, and the integral of the trace of df/dy, [B]: by as much
    has log p(y) fallen. Chen et al. 2018, arXiv:1806.07366 theorem 1.

    Args:
        probe: random signs or normals, like y: the trace is then estimated by probe (df/dy) probe, one backward pass
            for any dimension (Hutchinson; Grathwohl et al. 2018, arXiv:1810.01367 sec. 3.1). Without one it is exact,
            a backward pass for each element of a row.
    """

    def rise(s: float, state: Tensor) -> Tensor:
        with torch.enable_grad():
            at = state[:, :-1].reshape(y.shape).detach().requires_grad_()
            slope = f(s, at)
            trace = _traced(slope, at) if probe is None else _pulled(slope, at, probe)
        return torch.cat([slope.detach().flatten(1), trace[:, None]], 1)

    flat = y.detach().reshape(len(y), -1)
    end = integrate(rise, torch.cat([flat, torch.zeros_like(flat[:, :1])], 1), start, stop, rtol, atol)
    return end[:, :-1].reshape(y.shape), end[:, -1]


def log_density(
    denoise: Denoiser, x: Tensor, path: Path, *, rtol: float = 1e-5, atol: float = 1e-5, smallest: float = 1e-3,
    prior: Callable[[Tensor], Tensor] | None = None, rng: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """log p(x) of clean samples x [B, ...] in nats, [B], under the probability-flow ODE of `denoise`, which autograd
    must be able to go through. Song et al. 2020, arXiv:2011.13456 eq. 39.

    It integrates in the angle arctan(sigma / alpha) of y = x / |(alpha, sigma)|, as `rk45`.

    Args:
        smallest: sigma / alpha at which x is taken to lie; the density found is that of data blurred by this much.
        prior: log density of y at t = 1, [B, ...] -> [B]; without one, the standard normal's, which is what y is to a
            network's sampler.
        rng: draws the signs of Hutchinson's estimate of the trace, one set for the whole way, without bias (appendix
            D.2); without one the trace is exact, a backward pass for each element of a sample at each slope.

    Raises:
        ValueError: a tolerance or `smallest` is not above 0, or no step meets the tolerances.
    """
    if not smallest > 0:
        raise ValueError(f"smallest must be above 0, where a network can be asked, got {smallest}")
    grid = at(path, [1.0, 0.0])
    noisy = grid.nodes[0]
    start, stop = atan(smallest), angle(noisy)

    def velocity(phi: float, y: Tensor) -> Tensor:
        n = noisy if phi == stop else grid.met([-log(tan(phi))])[0]
        return denoise(y * hypot(n.alpha, n.sigma), n).mix(x0=-sin(phi), eps=cos(phi))

    probe = None if rng is None else 2 * torch.randint(2, x.shape, generator=rng, device=rng.device).to(x) - 1
    y, fallen = transported(velocity, x * cos(start), start, stop, rtol, atol, probe)
    end = y.flatten(1) if y.ndim > 1 else y[:, None]
    standard = -(end.square() + log(2 * pi)).sum(1) / 2
    return (standard if prior is None else prior(y)) + fallen + x[0].numel() * log(cos(start))


def _traced(slope: Tensor, y: Tensor) -> Tensor:
    """The trace of d slope / dy of each row, an element at a time."""
    parts = slope.reshape(len(y), -1).sum(0)  # rows do not see each other
    rows = [
        torch.autograd.grad(part, y, retain_graph=True)[0].reshape(len(y), -1)[:, i] for i, part in enumerate(parts)
    ]
    return torch.stack(rows).sum(0)


def _pulled(slope: Tensor, y: Tensor, probe: Tensor) -> Tensor:
    """probe (d slope / dy) probe of each row."""
    return (torch.autograd.grad(slope, y, probe)[0] * probe).reshape(len(y), -1).sum(1)
