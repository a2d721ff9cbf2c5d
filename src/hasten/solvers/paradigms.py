"""ParaDiGMS: Picard iteration over a sliding window of steps."""

from __future__ import annotations

from collections.abc import Generator
from itertools import pairwise

import torch
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid
from hasten.solvers.chain import Eta, Tolerance, Window, check, extended, first_loose, stepped
from hasten.solvers.declare import Many, solver


@solver(order=1, asks="batches", stochastic=lambda eta, **_: eta > 0)
def paradigms(
    x: Tensor, grid: Grid, noise: Noise | None = None, *,
    eta: Eta = 0.0,
    window: Window = 64,
    tolerance: Tolerance = 1e-2,
) -> Generator[Many, list[Prediction], Tensor]:  # fmt: skip
    """`ddpm` of this eta, DDIM at 0, to a tolerance: a batch of `window` times a pass, and at most as many passes as
    steps. Shih et al. 2023, arXiv:2305.16317.

    All moves of the window are taken at the states as they are guessed, and summed from its first state, which is
    settled; the window slides over the states that this leaves where they were, and on to the first that it moves,
    whose own move is exact by then.

    Args:
        tolerance: about how far the sample may be from the sequential one, in root mean square. A state that moves by
            this over the number of steps has settled, in units of its |(alpha, sigma)|. (The paper's unit is the noise
            that DDPM adds in a step, which is none in the last.)

    Raises:
        ValueError: the tolerance is not above 0, or a prediction is NaN.
    """
    check(tolerance, window)
    begin, states = 0, x[None]
    while True:
        here = grid.nodes[begin : begin + window + 1]
        states = extended(states, here)
        ps = yield Many(states[:-1], here[:-1])
        moves = [stepped(p, *step, noise, eta).sub_(p.x) for p, step in zip(ps, pairwise(here), strict=True)]
        new = states[0] + torch.stack(moves).cumsum(0)
        settled = min(len(new), first_loose(new - states[1:], here[1:], tolerance / len(grid)) + 1)
        begin, states = begin + settled, new[settled - 1 :]
        if begin == len(grid):
            return states[-1]
