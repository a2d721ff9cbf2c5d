"""UniPC: a predictor, and a corrector that uses the call of the next step, so it costs none."""

from __future__ import annotations

from itertools import zip_longest
from math import expm1, isfinite, isinf
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.grid import Grid, Node
from hasten.solvers.declare import Steps, solver
from hasten.solvers.exponential import weights

even = "start"


@solver(order=lambda order, corrector, **_: order + corrector, systems=("unipc",))
def unipc(
    x: Tensor, grid: Grid, *,
    order: Annotated[int, Field(ge=1, le=5)] = 2,
    variant: Literal["bh1", "bh2"] = "bh2",
    corrector: bool = True,
) -> Steps:  # fmt: skip
    """One call a step: UniPC of any order, in x0. Zhao et al. 2023, arXiv:2302.04867 appendix A.

    UniP predicts from the last `order` x0; once the network has been asked at the predicted state, UniC corrects it by
    the same ones and the new one, which is one order more. Fewer are used while there are fewer, and before a clean
    end. Pure noise, where lam is infinite, is used beside one other, by a straight line in alpha / sigma.

    The order, `order` + 1 with the corrector, needs small first steps, as of any multistep method that starts itself:
    the first step is of order two (of one, without the corrector), so on an even grid the error falls no faster than
    the third (second) power of the steps, though only far below what `order` + 1 has left by then.

    Args:
        order: of the predictor: how many x0 it looks back on.
        variant: B(h) = h or e^h - 1. Where two or more unknowns remain the paper's linear system has one solution
            whatever B, so it matters to the predictor of order two and to the first step's corrector alone.
        corrector: correct; without it this is UniP.
    """
    seen: list[tuple[Node, Tensor]] = []  # the newest first
    used: list[float] = []  # the shares of them in the last step
    ends_clean = grid.nodes[-1].clean
    for left, (now, after) in zip(range(len(grid), 0, -1), grid.steps(), strict=False):
        p = yield x, now
        x0 = p.x0
        if after.clean:
            return after.alpha * x0
        gain = after.sigma / now.sigma
        carried: list[float] = []
        if corrector and used:  # a change of the state, which the caller may have edited, that the step multiplies
            last = [n for n, _ in seen[: len(used)]]
            *better, new = _weights(last[0], now, [*last, now], variant)
            carried = [gain * new, *(gain * (w - u) for w, u in zip(better, used, strict=True))]
        seen = [(now, x0), *seen]
        back = [n for n, _ in seen[: min(order, left) if ends_clean else order]]
        used = _weights(now, after, back if len(back) <= 2 else [n for n in back if isfinite(n.lam)], variant)
        x = torch.mul(p.x, gain)
        shares = [w + c for w, c in zip_longest(used, carried, fillvalue=0.0)]
        for share, (_, x0_then) in zip(shares, seen, strict=False):
            x.add_(x0_then, alpha=share)
        seen = seen[:order]
    return x


def _weights(now: Node, after: Node, through: list[Node], variant: str) -> list[float]:
    """Shares of x0 at `through`, the first of which is `now`, in x' = (sigma' / sigma) x + sum_k w_k x0_k: eq. 5; for
    two nodes with a_1 = 1/2, the simplification after it."""
    if len(through) != 2 or any(isinf(n.lam) for n in through):
        return weights(now, after, through)
    h = after.lam - now.lam
    rise = -expm1(-h)
    other = after.alpha * (h if variant == "bh1" else rise) * h / (2 * (through[1].lam - now.lam))
    return [after.alpha * rise - other, other]
