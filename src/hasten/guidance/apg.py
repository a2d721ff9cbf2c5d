"""Adaptive projected guidance: the part of guidance that adds detail, without the part that saturates."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node
from hasten.guidance.inside import guided
from hasten.guidance.trajectory import Trajectory
from hasten.method import Method, Part, Stage
from hasten.moment import Moment
from hasten.patch import Patch

Eta = Annotated[float, Field(ge=0, le=1)]
Radius = Annotated[float, Field(ge=0, le=1000)]
Momentum = Annotated[float, Field(ge=-0.95, le=0.95)]


def apg(
    cond: Denoiser, uncond: Denoiser, *,
    scale: Annotated[float, Field(ge=0, le=100)] = 5.0,
    eta: Eta = 0.0,
    radius: Radius = 0.0,
    momentum: Momentum = -0.5,
) -> Denoiser:  # fmt: skip
    """x0 = c + (scale - 1) update, where the update is made of c - u in three steps, all on x0.

    1. Momentum: d + `momentum` times the last one's average; negative pushes away from where guidance went before.
    2. Rescaling: an update longer than `radius` (L2 over a row of the batch) is shortened to it; 0 is no limit.
    3. Projection: the part along c itself, which makes pictures brighter and more saturated, is kept by a share `eta`.

    eta = 1, radius = 0, momentum = 0 is classifier-free guidance. Sadat et al. 2024, arXiv:2410.02416 alg. 1.
    (diffusers' guider adds scale times the update to u instead, which is the same only where the update is c - u.)

    The average is of one trajectory: where time starts again it is forgotten; see `Trajectory`. Two network calls; one
    at scale 1.
    """
    if scale == 1:
        return cond
    average = _Average(momentum)

    def projected(x: Tensor, node: Node) -> Prediction:
        return _projected(cond(x, node), uncond(x, node), node, average, scale, eta, radius)

    return projected


class _Average:
    """The sum of what it is given, each older one weighed `momentum` times more often."""

    def __init__(self, momentum: float) -> None:
        self.momentum, self.trajectory = momentum, Trajectory()
        self.last: Tensor | None = None

    def __call__(self, d: Tensor, node: Node) -> Tensor:
        if self.momentum == 0:
            return d
        before = self.last if self.trajectory.step(node) else None
        self.last = d if before is None else torch.add(d, before, alpha=self.momentum)
        return self.last


def _projected(
    c: Prediction, u: Prediction, node: Node, average: _Average, scale: float, eta: float, radius: float
) -> Prediction:
    x0 = c.x0
    each = tuple(range(1, x0.ndim))
    d = average(x0 - u.x0, node)
    if radius > 0:
        length = torch.linalg.vector_norm(d, dim=each, keepdim=True)
        d = d * (radius / length.clamp_min(radius))
    if eta < 1:
        share = (d * x0).sum(each, keepdim=True) / (x0 * x0).sum(each, keepdim=True).clamp_min(1e-24)
        d = d - (1 - eta) * share * x0
    move = (scale - 1) * d
    return Prediction(c.x, x0 + move, c.eps - node.alpha / node.sigma * move, spread=c.spread)


class Apg(Method):
    """Adaptive projected guidance in a pipeline: c + (s - 1) update on x0, whose part along c is kept by a share `eta`,
    whose length is at most `radius` (0: any), and which remembers by `momentum`. eta = 1, radius = 0, momentum = 0
    changes nothing. Sadat et al. 2024, arXiv:2410.02416 alg. 1. Two calls an evaluation, as before."""

    stage: ClassVar = Stage.GUIDANCE
    writes: ClassVar = frozenset({Part.GUIDANCE})
    neutral: ClassVar[dict[str, Any]] = {"eta": 1.0, "radius": 0.0, "momentum": 0.0}
    saves: ClassVar = False

    eta: Eta = 0.0
    radius: Radius = 0.0
    momentum: Momentum = -0.5

    def apply(self, model: nn.Module) -> Patch:
        if (self.eta, self.radius, self.momentum) == (1, 0, 0):
            return Patch()
        average = _Average(self.momentum)

        def answer(here: Moment, node: Node, scale: float, c: Prediction, u: Prediction) -> Prediction:
            return _projected(c, u, node, average, scale, self.eta, self.radius)

        return guided(self.label(), model, answer)
