"""One step of the sequential sampler that the solvers parallel in time reproduce, and how far a guess is from it."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hasten.brownian import Noise
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node
from hasten.solvers.ddpm import ddpm

Eta = Annotated[float, Field(ge=0, le=1)]
Window = Annotated[int, Field(ge=1, le=1000)]
Tolerance = Annotated[float, Field(gt=0, le=1)]


def stepped(p: Prediction, now: Node, after: Node, noise: Noise | None, eta: float) -> Tensor:
    """The state at `after`, new, that `ddpm` goes to from p.x at `now`; DDIM's where there is no noise. A Brownian
    motion gives a step the same noise however often it is asked."""
    if noise is None:
        return p.mix(x0=after.alpha, eps=after.sigma)
    steps = ddpm.run(p.x, Grid((now, after)), noise, eta=eta)
    next(steps)
    try:
        steps.send(p)
    except StopIteration as end:
        state: Tensor = end.value
        return state
    raise AssertionError("a grid of one step asks once")


def extended(states: Tensor, nodes: Sequence[Node]) -> Tensor:
    """States [K, B, ...], the first of them at nodes[0], with a guess for all further nodes: the last one again, in the
    scale |(alpha, sigma)| of each."""
    sizes = [hypot(n.alpha, n.sigma) for n in nodes[len(states) - 1 :]]
    return torch.cat([states, *(states[-1:] * (size / sizes[0]) for size in sizes[1:])])


def first_loose(off: Tensor, nodes: Sequence[Node], tolerance: float) -> int:
    """The first of the states that is `off` [K, B, ...] by more than the tolerance, K where none is: in root mean
    square, of the worst row, in units of |(alpha, sigma)| at its node. The one number a pass reads from the device.

    Raises:
        ValueError: what a state is off by is no number.
    """
    sizes = torch.tensor([hypot(n.alpha, n.sigma) for n in nodes])
    missed = off.reshape(*off.shape[:2], -1).square().mean(-1).sqrt().amax(1).cpu() / sizes
    if bool(missed.isnan().any()):
        raise ValueError(f"NaN in a batch from t = {nodes[0].t:.4f} on: the network answered it; use a wider precision")
    loose = (missed > tolerance).nonzero()
    return int(loose[0]) if len(loose) else len(off)


def check(tolerance: float, window: int = 1) -> None:
    """Raises ValueError where nothing could ever settle."""
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance}: for no error take ddim or ddpm, one by one")
    if window < 1:
        raise ValueError(f"a window holds one step or more, got {window}")
