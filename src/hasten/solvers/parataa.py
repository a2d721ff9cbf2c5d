"""ParaTAA: all steps as one triangular system of equations, solved by fixed-point passes that Anderson accelerates."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid
from hasten.solvers.chain import Eta, Tolerance, Window, check, extended, first_loose, stepped
from hasten.solvers.declare import Many, solver

RIDGE = 1e-8
"""What is added to the diagonal of the least squares, of its mean."""

Pass = tuple[int, Tensor, Tensor]
"""First step of a window, the states that it guessed, and their residuals."""


@solver(order=1, asks="batches", stochastic=lambda eta, **_: eta > 0, systems=("parataa",))
def parataa(
    x: Tensor, grid: Grid, noise: Noise | None = None, *,
    eta: Eta = 0.0,
    window: Window = 64,
    span: Annotated[int, Field(ge=1, le=1000)] = 20,
    memory: Annotated[int, Field(ge=1, le=10)] = 3,
    hold: Literal["move", "noise"] = "move",
    tolerance: Tolerance = 1e-2,
) -> Generator[Many, list[Prediction], Tensor]:  # fmt: skip
    """`ddpm` of this eta, DDIM at 0, to a tolerance: a batch of `window` times a pass, and at most as many passes as
    steps. Tang et al. 2024, arXiv:2402.09970.

    With r_i = F_i(x_i) - x_(i+1) what a step of the sampler misses, the equation of order k for x_(i+1) runs the last k
    steps from x_(i+1-k) on, of each holding what the network said: its residual is R_i = sum_j w_ij r_j, j from i - k +
    1 to i. A pass adds R to the states, less what Anderson's extrapolation takes from the passes before: for row i the
    least squares that explain R_0 .. R_i, the rows up to it alone, as a later state never changes an earlier one. The
    first row that has not settled is not extrapolated: it becomes exact, and is settled by this.

    Args:
        span: k, the order of the equations; 1 is the sampler's step itself.
        memory: passes that the extrapolation looks at, this one among them; 1 is the fixed-point pass alone.
        hold: what a step keeps while those before it change: its "noise", as in the paper, w_ij = alpha_(i+1) /
            alpha_(j+1), or its whole "move", as Picard's iteration does, w_ij = 1, which took fewer passes wherever
            they differed in our tests.
        tolerance: about how far the sample may be from the sequential one, in root mean square. A step that misses by
            this over the number of steps has settled, in units of its state's |(alpha, sigma)|. (The paper's unit is
            the noise that DDPM adds in a step, which is none in the last.)

    Raises:
        ValueError: the tolerance is not above 0, or a prediction is NaN.
    """
    check(tolerance, window)
    begin, states = 0, x[None]
    past: list[Pass] = []
    while True:
        here = grid.nodes[begin : begin + window + 1]
        states = extended(states, here)
        ps = yield Many(states[:-1], here[:-1])
        ahead = [stepped(p, *step, noise, eta) for p, step in zip(ps, pairwise(here), strict=True)]
        missed, guess = torch.stack(ahead).sub_(states[1:]), states[1:]
        loose = first_loose(missed, here[1:], tolerance / len(grid))
        sizes = [n.alpha if hold == "noise" else 1.0 for n in here[1:]]
        missed = torch.tensordot(_carried(sizes, span).to(missed), missed, 1)
        new = guess + missed
        past = [*past[1 - memory :], (begin, guess, missed)] if memory > 1 else []
        if len(past) > 1 and loose + 1 < len(new):
            new[loose + 1 :] -= _taken(past)[loose + 1 :]
        settled = min(len(new), loose + 1)
        begin, states = begin + settled, new[settled - 1 :]
        if begin == len(grid):
            return states[-1]


def _carried(sizes: Sequence[float], span: int) -> Tensor:
    """w [K, K]: sizes_i / sizes_j on and below the diagonal, in a band of `span`."""
    size = torch.tensor(sizes, dtype=torch.float64)
    return (size[:, None] / size).tril().triu(1 - span)


def _taken(past: Sequence[Pass]) -> Tensor:
    """What Anderson's extrapolation takes from the last pass's states plus residuals, [K, B, ...]: (dX + dR) g, where g
    minimises |R - dR g|^2 over the rows up to each one, for every sample on its own.

    A row looks back on passes alone whose windows held it.
    """
    begin, guess, missed = past[-1]
    moved, changed, held = [], [], []
    for (start, x, r), (follow, y, s) in pairwise(past):
        rows = max(0, start + len(x) - begin)
        padding = torch.zeros_like(guess[rows:])
        moved.append(torch.cat([y[begin - follow :][:rows] - x[begin - start :], padding]))
        changed.append(torch.cat([s[begin - follow :][:rows] - r[begin - start :], padding]))
        held.append([i < rows for i in range(len(guess))])
    flat = *guess.shape[:2], guess[0, 0].numel()
    dx, dr, r = torch.stack(moved).reshape(-1, *flat), torch.stack(changed).reshape(-1, *flat), missed.reshape(flat)
    known = torch.tensor(held, dtype=torch.float64, device=r.device).T[:, None]  # [K, 1, passes]
    gram = torch.einsum("pkbn,qkbn->kbpq", dr, dr).double().cumsum(0) * known[..., None] * known[..., None, :]
    pull = torch.einsum("pkbn,kbn->kbp", dr, r).double().cumsum(0) * known
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-200
    g = torch.linalg.solve(gram + ridge[..., None, None] * torch.eye(len(dr), device=r.device), pull)
    return torch.einsum("pkbn,kbp->kbn", dx + dr, g.to(r)).reshape(guess.shape)
