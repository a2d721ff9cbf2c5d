"""DPM-Solver-v3: the linear part of the ODE that fits the model best, from statistics of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import cos, exp, isfinite, pi, prod
from typing import Annotated, Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev, Legendre
from pydantic import Field
from torch import Tensor

from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.solvers.declare import Steps, solver

Row = tuple[float, float, float, float]
"""lam, l, s, b."""

even = "start"

POINTS, SHARES = ((v + shift) / 2 for v, shift in zip(np.polynomial.legendre.leggauss(16), (1, 0), strict=True))
"""Gauss's quadrature on [0, 1]."""

_POLYNOMIALS = [Legendre.basis(k, [0, 1]) for k in range(len(POINTS))]
BEFORE = np.stack([q.integ(lbnd=0)(POINTS) for q in _POLYNOMIALS], 1) @ np.linalg.inv(
    np.stack([q(POINTS) for q in _POLYNOMIALS], 1)
)
"""[16, 16], from values at the points to the integrals from 0 to them."""


@solver(order=lambda order, corrector, **_: order + corrector, fitted=True)
def dpm_solver_v3(
    x: Tensor, grid: Grid, *,
    statistics: tuple[Row, ...] = (),
    order: Annotated[int, Field(ge=1, le=3)] = 2,
    corrector: bool = True,
) -> Steps:  # fmt: skip
    """One call a step: multistep predictor and corrector on f = (sigma eps - l x) / alpha. Zheng et al. 2023,
    arXiv:2310.13268 sec. 3, as their code has it.

    By lam, y = x / alpha moves as y' = -l y - f, and the statistics are chosen so that f hardly moves but as f' = s f +
    b: a step carries what it has seen of f to its start by that, and guesses no more than the rest, as a polynomial in
    lam. l = 1, s = b = 0 is DPM-Solver++, l = 0, s = -1, b = 0 is DPM-Solver. The paper has an l, s and b for every
    element; here one serves for all, so that they are few numbers in a recipe. The order, the start and the ends are as
    in `unipc`.

    Args:
        statistics: rows (lam, l, s, b), from `statistics`.
        order: of the predictor: how many f it looks back on.
        corrector: correct each state by the call at it.

    Raises:
        ValueError: without statistics, or where the grid leaves their lam.
    """
    model = _read(statistics, [n.lam for n in grid.nodes if isfinite(n.lam)])
    seen: list[_Seen] = []  # the newest first
    used: list[float] = []  # the shares of them in the last step, and the constant
    span: _Span | None = None
    ends_clean = grid.nodes[-1].clean
    for left, (now, after) in zip(range(len(grid), 0, -1), grid.steps(), strict=False):
        p = yield x, now
        if after.clean or not isfinite(now.lam):
            x = p.mix(x0=after.alpha, eps=after.sigma)
            continue
        f = p.mix(eps=now.sigma / now.alpha, x=-model.linear(now.lam) / now.alpha)
        change = 0.0
        changes: list[float] = []
        if span is not None:
            if corrector:
                ahead = _Seen(now.lam, f, exp(-span.s), -span.b)
                *better, new, constant = span.shares([*seen[: len(used) - 1], ahead])
                changes = [new, *(w - u for w, u in zip(better, used[:-1], strict=True))]
                change = constant - used[-1]
            seen = [_Seen(o.lam, o.f, exp(span.s) * o.gain, exp(span.s) * (o.add + span.b)) for o in seen]
        seen = [_Seen(now.lam, f, 1.0, 0.0), *seen]
        span = model.span(now, after)
        used = span.shares(seen[: min(order, left) if ends_clean else order])
        x = torch.mul(p.x, span.gain).add_(used[-1] + span.gain * change)
        shares = [w + span.gain * c for w, c in zip_longest(used[:-1], changes, fillvalue=0.0)]
        for share, o in zip(shares, seen, strict=False):
            x.add_(o.f, alpha=share)
        seen = seen[:order]
    return x


def statistics(
    denoise: Any, samples: Tensor, path: Path, reach: tuple[float, float], rng: torch.Generator, points: int = 25
) -> tuple[Row, ...]:
    """What `dpm_solver_v3` reads, measured on clean samples [B, ...], the more the better, at Chebyshev's points in lam
    from one end of `reach` to the other. Two calls of the network and two derivatives a point.

    l is the mean of sigma d eps / dx over the elements (Hutchinson's trace): the linear part that leaves f the least
    gradient. s and b are the least-squares line of f' on f along the ODE. Zheng et al. 2023, arXiv:2310.13268 sec. 3.

    Args:
        denoise: with derivatives, such as `hasten.denoiser.denoiser` makes.

    Raises:
        ValueError: it has none, or the path does not reach so far.
    """
    if not hasattr(denoise, "jet"):
        raise ValueError("statistics need derivatives: make the denoiser with hasten.denoiser.denoiser")
    low, high = sorted(reach)
    lams = [(low + high - (high - low) * cos(pi * k / (points - 1))) / 2 for k in range(points)]
    found = []
    for n in at(path, path.time(torch.tensor(lams, dtype=torch.float64)).tolist()).nodes:
        noise = torch.randn(samples.shape, generator=rng, device=rng.device).to(samples)
        sign = torch.randint(0, 2, samples.shape, generator=rng, device=rng.device).to(samples) * 2 - 1
        x = n.alpha * samples + n.sigma * noise
        linear = n.sigma * float((sign * denoise.jet(x, n, lambda _, sign=sign: sign, 0.0)[1]).mean())
        speed = 1 / (n.dalpha / n.alpha - n.dsigma / n.sigma)  # dt / dlam
        p, change = denoise.jet(x, n, partial(_velocity, n, speed), speed)
        f = p.mix(eps=n.sigma / n.alpha, x=-linear / n.alpha)
        rest = (n.sigma / n.alpha) * (change - (1 - linear) * p.eps)  # f' = rest - l' y
        found.append((n.lam, linear, *_line(f, rest), *_line(f, x / n.alpha)))
    falling = _fit([row[0] for row in found], [row[1] for row in found]).deriv()
    return tuple(
        (lam, linear, float(s - falling(lam) * s_y), float(b - falling(lam) * b_y))
        for lam, linear, s, b, s_y, b_y in found
    )


def _velocity(n: Node, speed: float, p: Prediction) -> Tensor:
    return p.mix(x0=speed * n.dalpha, eps=speed * n.dsigma)


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and start of the least-squares line of y on x."""
    off = x - x.mean()
    spread = float(off.square().mean())
    flat = spread <= 1e-10 * float(x.square().mean())  # one number, which tells no slope
    slope = 0.0 if flat else float((off * y).mean()) / spread
    return slope, float(y.mean()) - slope * float(x.mean())


@dataclass(frozen=True)
class _Seen:
    """f at lam, and what it is worth where the step starts: gain f + add."""

    lam: float
    f: Tensor
    gain: float
    add: float


@dataclass(frozen=True)
class _Span:
    """Integrals over a step, the paper's L, S and B counted from its start: L and S of l and s, B of e^-S b.

    Attributes:
        lam: Gauss's points.
        kernel: their weights times e^(L + S).
        before: B at the points.
        s, b: S and B at the end.
        gain, pull: of the state and of what is integrated.
    """

    lam: np.ndarray
    kernel: np.ndarray
    before: np.ndarray
    s: float
    b: float
    gain: float
    pull: float

    def shares(self, through: Sequence[_Seen]) -> list[float]:
        """Of every f in the state at the end, and the constant."""
        found, constant = [], float(self.kernel @ self.before)
        for o in through:
            w = float(
                prod(((self.lam - q.lam) / (o.lam - q.lam) for q in through if q is not o), start=self.kernel).sum()
            )
            found.append(self.pull * w * o.gain)
            constant += w * o.add
        return [*found, self.pull * constant]


@dataclass(frozen=True)
class _Model:
    """The statistics as functions of lam: l, s and b."""

    linear: Chebyshev
    scaling: Chebyshev
    bias: Chebyshev

    def span(self, now: Node, after: Node) -> _Span:
        h = after.lam - now.lam
        lam = now.lam + h * POINTS
        rise, run = (c.integ(lbnd=now.lam) for c in (self.linear, self.scaling))
        b = h * np.exp(-run(lam)) * self.bias(lam)
        fall = exp(-rise(after.lam))
        return _Span(
            lam, h * SHARES * np.exp(rise(lam) + run(lam)), BEFORE @ b, float(run(after.lam)), float(SHARES @ b),
            fall * after.alpha / now.alpha, -fall * after.alpha,
        )  # fmt: skip


def _read(rows: tuple[Row, ...], lams: Sequence[float]) -> _Model:
    if len(rows) < 2:
        raise ValueError("dpm_solver_v3 has no statistics of the model: measure them with its `statistics`")
    at, *values = zip(*rows, strict=True)
    if lams and not (at[0] - 1e-6 <= lams[0] and lams[-1] <= at[-1] + 1e-6):
        reach = f"reach from lam {at[0]:.3f} to {at[-1]:.3f} and the grid from {lams[0]:.3f} to {lams[-1]:.3f}"
        raise ValueError(f"the statistics {reach}: measure them on more, or take another grid")
    return _Model(*(_fit(at, v) for v in values))


def _fit(lams: Sequence[float], values: Sequence[float]) -> Chebyshev:
    """Of fewer degrees than there are values, so that their noise is smoothed."""
    return Chebyshev.fit(lams, values, 2 * len(lams) // 3)
