"""CFG-Zero*: an unconditional prediction of the right length, and no step while the network knows nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from hasten.denoiser import Denoiser, Prediction, said
from hasten.grid import Node
from hasten.guidance.cfg import cfg
from hasten.guidance.inside import guided
from hasten.guidance.trajectory import Trajectory
from hasten.method import Method, Part, Stage
from hasten.moment import Moment
from hasten.patch import Patch

Zeros = Annotated[int, Field(ge=0, le=20)]


def zero_star(
    cond: Denoiser, uncond: Denoiser, *,
    scale: Annotated[float, Field(ge=0, le=100)] = 5.0,
    zeros: Zeros = 1,
    optimise: bool = True,
) -> Denoiser:  # fmt: skip
    """s* u + scale (c - s* u), where s* = <c, u> / |u|^2 of each row brings u nearest to c; and a velocity of zero at
    the first `zeros` evaluations, where an undertrained flow leads further astray than standing still.

    Both are of the velocity of the straight path, eps - x0, on every path: the same sample up to a scale. optimise =
    False and zeros = 0 is classifier-free guidance. Fan et al. 2025, arXiv:2503.18886 sec. 4 and alg. 1. (The authors'
    code zeroes one evaluation more than its `zero_steps` says, diffusers' as many; so does this.)

    Two network calls, none where the velocity is zero; one at scale 1.
    """
    plain, trajectory = cfg(cond, uncond, scale=scale), Trajectory()

    def starred(x: Tensor, node: Node) -> Prediction:
        if zeros > 0 and trajectory.step(node) < zeros:
            return _still(x, node)
        if not optimise or scale == 1:
            return plain(x, node)
        return _starred(cond(x, node), uncond(x, node), node, scale)

    return starred


def _still(x: Tensor, node: Node) -> Prediction:
    """eps = x0: the straight path's velocity is zero."""
    same = x / (node.alpha + node.sigma)
    return Prediction(x, same, same)


def _starred(c: Prediction, u: Prediction, node: Node, scale: float) -> Prediction:
    v, w = said("flow", c, node), said("flow", u, node)
    each = tuple(range(1, v.ndim))
    best = (v * w).sum(each, keepdim=True) / ((w * w).sum(each, keepdim=True) + 1e-8)
    w = best * w
    return replace(Prediction.of("flow", w + scale * (v - w), c.x, node), spread=c.spread)


class ZeroStar(Method):
    """CFG-Zero* in a pipeline: the unconditional prediction is scaled to fit the conditional one, and the velocity is
    zero at the first `zeros` evaluations. zeros = 0 and optimise = False changes nothing. Made for flow models; on
    others it acts on the velocity eps - x0 that the network implies. Fan et al. 2025, arXiv:2503.18886 alg. 1."""

    stage: ClassVar = Stage.GUIDANCE
    writes: ClassVar = frozenset({Part.GUIDANCE})
    neutral: ClassVar[dict[str, Any]] = {"zeros": 0, "optimise": False}
    saves: ClassVar = False

    zeros: Zeros = 1
    optimise: bool = True

    def apply(self, model: nn.Module) -> Patch:
        if self.zeros == 0 and not self.optimise:
            return Patch()

        def answer(here: Moment, node: Node, scale: float, c: Prediction, u: Prediction) -> Prediction:
            if here.step < self.zeros:
                return _still(c.x, node)
            if self.optimise:
                return _starred(c, u, node, scale)
            return cfg(lambda *_: c, lambda *_: u, scale=scale)(c.x, node)

        return guided(self.label(), model, answer)
