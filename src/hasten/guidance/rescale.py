"""Rescaled guidance: the strength of the conditional prediction, whatever the scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.denoiser import Denoiser, Prediction, Target, said
from hasten.grid import Node
from hasten.guidance.cfg import cfg
from hasten.guidance.inside import guided
from hasten.method import Method, Part, Stage
from hasten.moment import Moment
from hasten.patch import Patch

Phi = Annotated[float, Field(ge=0, le=1)]


def rescale(
    cond: Denoiser, uncond: Denoiser, *,
    scale: Annotated[float, Field(ge=0, le=100)] = 7.5,
    phi: Phi = 0.7,
    target: Target = "v",
) -> Denoiser:  # fmt: skip
    """Guides, then brings the standard deviation back from that of the guided to that of the conditional prediction,
    by a share `phi`; 0 is classifier-free guidance. Large scales blow predictions up, which looks overexposed.

    Lin et al. 2023, arXiv:2305.08891 sec. 3.4. Deviations are over each row of the batch, of what a network of
    `target` says: the paper's says v. Two network calls; one at scale 1.
    """
    plain = cfg(cond, uncond, scale=scale)
    if phi == 0 or scale == 1:
        return plain

    def tamed(x: Tensor, node: Node) -> Prediction:
        return _tamed(cond(x, node), uncond(x, node), node, scale, phi, target)

    return tamed


def _tamed(c: Prediction, u: Prediction, node: Node, scale: float, phi: float, target: Target) -> Prediction:
    said_c, said_u = said(target, c, node), said(target, u, node)
    g = said_u + scale * (said_c - said_u)
    each = tuple(range(1, g.ndim))
    ratio = said_c.std(each, keepdim=True) / g.std(each, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
    return replace(Prediction.of(target, g * (phi * ratio + (1 - phi)), c.x, node), spread=c.spread)


class Rescale(Method):
    """Rescaled guidance in a pipeline: u + s (c - u), brought back towards the standard deviation of c by a share
    `phi`; 0 changes nothing. Lin et al. 2023, arXiv:2305.08891 sec. 3.4, on what the network itself says: what
    `guidance_rescale` does in the pipelines that have it, in all."""

    stage: ClassVar = Stage.GUIDANCE
    writes: ClassVar = frozenset({Part.GUIDANCE})
    neutral: ClassVar[dict[str, Any]] = {"phi": 0.0}
    saves: ClassVar = False

    phi: Phi = 0.7

    def apply(self, model: nn.Module) -> Patch:
        def answer(here: Moment, node: Node, scale: float, c: Prediction, u: Prediction) -> Prediction:
            assert here.target is not None
            return _tamed(c, u, node, scale, self.phi, here.target)

        return guided(self.label(), model, answer) if self.phi > 0 else Patch()
