"""SA-Solver: stochastic Adams methods, predictor and corrector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from math import exp, expm1, isinf, sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver
from hasten.solvers.exponential import weights


def _order(predictor: int, corrector: int, tau: float, **_: object) -> int:
    if tau:
        return 1
    return min(corrector, predictor + 1, 3) if corrector else min(predictor, 2)


@solver(order=_order, weak=2, stochastic=True)
def sa_solver(
    x: Tensor, grid: Grid, noise: Noise, *,
    predictor: Annotated[int, Field(ge=1, le=4)] = 2,
    corrector: Annotated[int, Field(ge=0, le=4)] = 2,
    tau: Annotated[float, Field(ge=0, le=2)] = 1.0,
    rescaled: bool = False,
) -> Steps:  # fmt: skip
    """One call a step: Adams-Bashforth on x0 over the exact solution with noise tau (`sde_dpmpp_2m` has it), then, with
    the call of the next step, Adams-Moulton over the same step and the same noise. Xue et al. 2023, arXiv:2309.05019
    eq. 14 and 17.

    Fewer points are used while there are fewer, and before a clean end. Without noise (tau = 0) the order is that of
    the corrector's points, at most one above the predictor's, and at most 3, which its first step has; without a
    corrector the first step leaves 2. With noise the strong order is 1, and the weak order 2 from two points on, of
    either. First order from pure noise, where the step is infinite.

    Args:
        predictor: x0 that the predictor looks back on.
        corrector: x0 that the corrector goes through, the new one among them (the authors' code counts so; the paper
            counts one less); 0 is none.
        tau: share of the noise, constant; 1 is the reverse SDE.
        rescaled: with two points, take h^2 / 2 for the line's weight instead of its integral, as the authors do for few
            steps (appendix D); diffusers always does.

    Raises:
        ValueError: more than two points are asked of fewer steps.
    """
    if max(predictor, corrector) > max(2, len(grid)):
        raise ValueError(f"{max(predictor, corrector)} points can't be had in {len(grid)} steps: ask for fewer points")
    rate = 1 + tau**2
    seen: list[tuple[Node, Tensor]] = []  # the newest first
    used: list[float] = []  # the predictor's weights of the last step
    for left, (now, after) in zip(range(len(grid), 0, -1), grid.steps(), strict=True):
        p = yield x, now
        x0, state = p.x0, p.x
        if after.clean:
            return after.alpha * x0
        if corrector and used:  # as a change of the state, which may have been edited
            through = [(now, x0), *seen[: corrector - 1]]
            better = _weights(rate, seen[0][0], now, through, rescaled)
            changes = zip_longest(better, [0.0, *used], fillvalue=0.0)
            for (new, old), (_, x0_seen) in zip(changes, [(now, x0), *seen], strict=False):
                state = torch.add(state, x0_seen, alpha=new - old)
        seen = [(now, x0), *seen[: max(predictor, corrector - 1) - 1]]
        fresh = -expm1(2 * tau**2 * (now.lam - after.lam)) if tau else 0.0
        count = min(predictor, left) if grid.nodes[-1].clean else predictor
        used = _weights(rate, now, after, seen[:count], rescaled)
        x = torch.mul(state, after.sigma / now.sigma * sqrt(1 - fresh))
        for w, (_, x0_seen) in zip(used, seen, strict=False):
            x.add_(x0_seen, alpha=w)
        if tau:
            z = noise(exp(2 * tau**2 * now.lam), exp(2 * tau**2 * after.lam), x)
            x.add_(z, alpha=after.sigma * sqrt(fresh))
        if isinf(now.lam):
            seen, used = [], []
    return x


def stretched(
    rate: float, now: Node, after: Node, seen: Sequence[tuple[Node, Tensor]]
) -> tuple[Node, Node, list[Node]]:
    """Nodes between which the integral over x0 of an SDE is that of the ODE: lam times `rate` = 1 + tau^2."""
    one, other, *through = (replace(n, lam=rate * n.lam) for n in (now, after, *(n for n, _ in seen)))
    return one, other, through


def _weights(
    rate: float, now: Node, after: Node, through: Sequence[tuple[Node, Tensor]], rescaled: bool
) -> list[float]:
    """Shares of the x0 seen at `through`."""
    if not (rescaled and len(through) == 2):
        return weights(*stretched(rate, now, after, through))
    h, (one, other) = after.lam - now.lam, (n.lam - now.lam for n, _ in through)
    whole = -expm1(-rate * h)
    first = (rate * h**2 / 2 - other * whole) / (one - other)
    return [after.alpha * first, after.alpha * (whole - first)]
