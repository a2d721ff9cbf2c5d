"""SRDS: parareal refinement of a coarse trajectory by blocks of fine steps that run side by side."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from math import exp, isqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid
from hasten.solvers.chain import Eta, Tolerance, check, first_loose, stepped
from hasten.solvers.declare import Many, solver


@dataclass
class Walk:
    """Fine steps through one block, from the state that one round has at its start."""

    round: int
    block: int
    place: int
    x: Tensor


@solver(order=1, asks="batches", stochastic=lambda eta, **_: eta > 0)
def srds(
    x: Tensor, grid: Grid, noise: Noise | None = None, *,
    eta: Eta = 0.0,
    blocks: Annotated[int, Field(ge=0, le=1000)] = 0,
    tolerance: Tolerance = 1e-2,
) -> Generator[Many, list[Prediction], Tensor]:  # fmt: skip
    """`ddpm` of this eta, DDIM at 0, to a tolerance, in at most as many passes as steps: blocks of fine steps in
    parallel, and one coarse step a block. Selvam et al. 2024, arXiv:2412.08292, in its pipelined form.

    In round p the state at the end of block b is G(x_b of p) + F(x_b of p - 1) - G(x_b of p - 1), with G one step over
    the block and F its fine steps; round 0 is G alone. After p rounds the first p blocks are exact. Each walk starts as
    soon as its state is known, beside those of other rounds, and its first call is also that of its coarse step. The
    rounds end where the sample moves by no more than the tolerance; noise of coarse and fine steps is of one path.

    Args:
        blocks: 0 takes the root of the number of steps, which is best where few rounds do.
        tolerance: root mean square between the samples of two rounds, in units of |(alpha, sigma)| at the end.

    Raises:
        ValueError: the tolerance is not above 0, or a prediction is NaN.
    """
    check(tolerance)
    nodes, steps = grid.nodes, len(grid)
    count = min(steps, blocks or isqrt(steps))
    edges = [b * steps // count for b in range(count + 1)]
    coarse: dict[tuple[int, int], Tensor] = {}
    fine: dict[tuple[int, int], Tensor] = {}
    ends: dict[int, Tensor] = {}
    for now, after in grid.steps():
        if (
            noise is not None and not after.clean
        ):  # a Brownian motion depends on the order of its readings: first the sequential sampler's
            noise(exp(2 * now.lam), exp(2 * after.lam), x)
    walks = [Walk(0, 0, 0, x)]
    while True:
        ps = yield Many(torch.stack([w.x for w in walks]), tuple(nodes[w.place] for w in walks))
        reached: list[tuple[int, int, Tensor]] = []  # round, block that it starts, state
        for w, p in zip(walks, ps, strict=True):
            k, b, now, last = w.round, w.block, nodes[w.place], edges[w.block + 1]
            if w.place == edges[b]:
                coarse[k, b] = stepped(p, now, nodes[last], noise, eta)
                if k == 0:
                    reached.append((0, b + 1, coarse[0, b]))
                elif (k - 1, b) in fine:
                    reached.append((k, b + 1, coarse[k, b] + fine.pop((k - 1, b)) - coarse.pop((k - 1, b))))
            w.x, w.place = stepped(p, now, nodes[w.place + 1], noise, eta), w.place + 1
            if w.place == last:
                if k == b:  # its start was exact
                    reached.append((k + 1, b + 1, w.x))
                elif (k + 1, b) in coarse:
                    reached.append((k + 1, b + 1, coarse[k + 1, b] + w.x - coarse.pop((k, b))))
                else:
                    fine[k, b] = w.x
        walks = [w for w in walks if w.place < edges[w.block + 1]]
        for k, b, state in sorted(reached, key=lambda r: r[0]):
            if b < count:
                walks.append(Walk(k, b, edges[b], state))
                continue
            ends[k] = state
            settled = k > 0 and first_loose((state - ends[k - 1])[None], nodes[-1:], tolerance) == 1
            if settled or k == count:
                return state
