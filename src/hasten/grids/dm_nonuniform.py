"""Times that minimise a bound of a multistep solver's error; no network is asked."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.grids.ends import even, laid
from hasten.path import Path

systems: tuple[str, ...] = ("optimized-time-steps",)

LEAST = 0.2
"""Of an even step: no step is shorter, so that times stay apart."""


def dm_nonuniform(
    path: Path, steps: int, *,
    order: Annotated[int, Field(ge=1, le=4)] = 2,
    power: Annotated[float, Field(ge=0, le=3)] = 1.0,
    low: Annotated[float, Field(ge=-8, le=-1, json_schema_extra={"low": -5, "high": -2})] = -3.5,
    high: Annotated[float, Field(ge=1, le=8, json_schema_extra={"low": 3, "high": 5})] = 4.0,
    cancel: bool = False,
) -> list[float]:  # fmt: skip
    """The times whose `bound` is least, between lam = `low`, met at t = 1, and `high`, met at t = 0; DM-NonUniform, Xue
    et al. 2024, arXiv:2402.17376 alg. 1.

    What was found is kept for the same settings.

    Args:
        order: of the solver's interpolation: 2 for UniPC and DPM-Solver++ as they are by default.
        power: how the network's error grows with noise; the paper has 1 for pixels and 2 for latents.
        cancel: as `bound` has it.
    """

    def knots(start: float, stop: float, count: int) -> Tensor:
        return torch.tensor(_least(start, stop, count, order, power, cancel), dtype=torch.float64)

    return laid(path, steps, knots, low, high, after=False)


def bound(lams: Tensor, order: int, power: float, cancel: bool = False) -> Tensor:
    """What errors of the network add up to at the end, a scalar; lams [N + 1] rise.

    A step from lam_n integrates e^lam times the polynomial through the last `order` x0, fewer while there are fewer
    and as the end nears: that gives each x0 a weight in each step. The error of an x0 is at most sigma^power / alpha
    (variance preserving), times a constant. arXiv:2402.17376 eq. 35.

    Args:
        cancel: after the third step an x0's weights in several steps may cancel, as in the authors' code; else each
            step counts for itself, the root of its sum of squares. The first is what the paper derives, the second
            has no spurious minima.
    """
    h, n = lams.diff(), len(lams) - 1
    back = torch.arange(n)[:, None] - torch.arange(order)  # [N, order]: which x0 a step uses, newest first
    used = torch.minimum(torch.minimum(torch.arange(n) + 1, n - torch.arange(n)), torch.tensor(order))
    spare = torch.arange(order) >= used[:, None]
    places = lams[back.clamp_min(0)] - lams[:n, None]
    moments = [torch.expm1(h)]  # the integral of e^s s^k over [0, h]
    for k in range(1, order):
        moments.append(torch.exp(h) * h**k - k * moments[-1])
    wanted = torch.where(spare, 0.0, torch.stack(moments, 1) * torch.exp(lams[:n, None]))
    powers = places[:, None, :] ** torch.arange(order)[:, None]
    own = torch.eye(order, dtype=lams.dtype).expand(n, -1, -1)
    powers = torch.where(spare[:, :, None] | spare[:, None, :], own, powers)
    error = torch.sqrt(torch.sigmoid(-2 * lams)) ** power / torch.sqrt(torch.sigmoid(2 * lams))
    weights = torch.linalg.solve(powers, wanted) * error[back.clamp_min(0)]
    apart = min(3, n) if cancel else n
    first = torch.sqrt(weights[:apart].square().sum(1)).sum()
    joined = torch.zeros(n, dtype=lams.dtype).index_add(
        0, back[apart:].clamp_min(0).flatten(), weights[apart:].flatten()
    )
    return first + joined.abs().sum()


@lru_cache(maxsize=1024)
def _least(start: float, stop: float, count: int, order: int, power: float, cancel: bool) -> tuple[float, ...]:
    """lams [count] from `start` to `stop` of least bound: searched from even ones, in the logs of their gaps."""

    def lams(logs: Tensor) -> Tensor:
        gaps = LEAST / (count - 1) + (1 - LEAST) * torch.softmax(logs, 0)
        return start + (stop - start) * torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])

    if count < 3:
        return tuple(even(start, stop, count).tolist())
    found = _descend(lambda logs: bound(lams(logs), order, power, cancel), torch.zeros(count - 1, dtype=torch.float64))
    return tuple(lams(found).tolist())


def _descend(value: Callable[[Tensor], Tensor], x: Tensor, rounds: int = 100) -> Tensor:
    """A local minimum by BFGS with halved steps (Nocedal & Wright 2006, alg. 6.1). torch.optim's takes seconds to
    import."""

    def slope(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            here = x.clone().requires_grad_()
            y = value(here)
            return y.detach(), torch.autograd.grad(y, here)[0]

    y, g = slope(x)
    inverse = torch.eye(len(x), dtype=x.dtype) / g.norm()
    for _ in range(rounds):
        along, share = -inverse @ g, 1.0
        while share > 1e-8 and value(x + share * along) > y + 1e-4 * share * (g @ along):
            share /= 2
        if share <= 1e-8 or g.norm() < 1e-9 * y:
            break
        step, before = share * along, g
        x = x + step
        y, g = slope(x)
        bend = g - before
        if (curve := step @ bend) > 0:
            turn = torch.eye(len(x), dtype=x.dtype) - torch.outer(step, bend) / curve
            inverse = turn @ inverse @ turn.T + torch.outer(step, step) / curve
    return x
