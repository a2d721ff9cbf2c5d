"""CFG++: guidance that stays on the data manifold."""

from __future__ import annotations

from math import exp, isnan
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Node
from hasten.guidance.cfg import cfg
from hasten.guidance.inside import guided
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment
from hasten.patch import Patch

Share = Annotated[float, Field(ge=0, le=1)]


def cfg_pp(cond: Denoiser, uncond: Denoiser, *, scale: Share = 0.6) -> Denoiser:
    """x0 of u + scale (c - u), and eps of u alone: the picture is guided, but noise is added back as the unconditional
    network sees it. A small scale, in [0, 1], does what 5 to 12 does in classifier-free guidance; 0 is u alone.

    Chung et al. 2024, arXiv:2406.08070 alg. 2. The paper writes it for DDIM; here the state that is answered with
    belongs to the two, alpha x0 + sigma eps, so that every solver that takes its state from the answer, as all do,
    steps from there: DDIM gives the paper's algorithm exactly, and multistep solvers their own form of it.

    Two network calls; one at scale 0.
    """
    if scale == 0:
        return uncond

    def guided(x: Tensor, node: Node) -> Prediction:
        c, u = cond(x, node), uncond(x, node)
        move = scale * (c.x0 - u.x0)
        return Prediction(x + node.alpha * move, u.x0 + move, u.eps, spread=c.spread)

    return guided


class CfgPp(Method):
    """CFG++ in a pipeline, of this `scale` in [0, 1] in the place of the pipeline's own. Chung et al. 2024,
    arXiv:2406.08070 alg. 2.

    A pipeline steps from its own state, so it is done by the scale of classifier-free guidance that makes the same
    step: from lam to lam' a step of DDIM moves by alpha' (1 - exp(lam - lam')) of what guidance adds to x0, CFG++ by
    alpha'; so it is scale / (1 - exp(lam - lam')). Exact for first-order deterministic solvers (`solver: ddim`, `euler`
    on flow models); close to the paper's idea for others of one call a step. The network is asked as often as before.
    """

    stage: ClassVar = Stage.GUIDANCE
    writes: ClassVar = frozenset({Part.GUIDANCE})
    saves: ClassVar = False

    scale: Share = 0.6

    def apply(self, model: nn.Module) -> Patch:
        def answer(here: Moment, node: Node, scale: float, c: Prediction, u: Prediction) -> Prediction:
            return cfg(lambda *_: c, lambda *_: u, scale=self.scale * _stretch(node))(c.x, node)

        return guided(self.label(), model, answer)


def _stretch(node: Node) -> float:
    """1 / (1 - exp(lam - lam')) from a node to its end. Raises Refused where the step is none."""
    kept = exp(node.lam - node.end.lam) if node.end is not None else 1.0
    if isnan(kept) or kept >= 1:
        raise Refused(
            "guidance.cfg_pp works with solvers of one call a step, such as ddim; this one asks twice at a time"
        )
    return 1 / (1 - kept)
