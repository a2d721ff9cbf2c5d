"""The first block tells whether the others are worth running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.cache.residual import reuse
from hasten.method import Method, Part, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch


class FirstBlock(Method):
    """Runs the first block always; where its residual has changed by less than `threshold` since the others last ran,
    they give their last residual again. threshold = 0 changes nothing. The rule is TeaCache's (Liu et al. 2024,
    arXiv:2411.19108 eq. 4, relative L1 change) put on the first block's residual, known as FBCache.

    On an accelerator the decision is one number read back a step.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"threshold": 0.0}

    threshold: float = Field(0.1, ge=0, le=2)

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            if self.threshold > 0:
                self._guard(patch, model)
            return patch.keep()

    def _guard(self, patch: Patch, model: nn.Module) -> None:
        chains = anatomy(model).chains
        first = chains[0][0]
        rests = [rest for rest in (chains[0][1:], *chains[1:]) if rest]
        marks: dict[tuple[int, str], Tensor] = {}  # first residual when the others last ran, a (run, branch)
        skip: dict[str, bool] = {}

        def watch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            start = first.inputs(args, kwargs)
            out = forward(*args, **kwargs)
            residual = first.outputs(out).x - start.x
            here = now()
            for old in [k for k in marks if k[0] != here.run]:
                del marks[old]
            mark = None if here.step == 0 else marks.get((here.run, here.branch))
            near = mark is not None and mark.shape == residual.shape and change(residual, mark) < self.threshold
            skip[here.branch] = near
            if not near:
                marks[here.run, here.branch] = residual
            return out

        def decide(here: Moment) -> bool:
            return skip.get(here.branch, False)

        for rest in rests:
            reuse(patch, rest, decide)
        patch.wrap(first.module, watch)


def change(new: Tensor, old: Tensor) -> float:
    """Relative L1 change, mean |new - old| / mean |old|; 0 where both are zero."""
    base = torch.mean(old.abs(), dtype=torch.float32)
    moved = torch.mean((new - old).abs(), dtype=torch.float32)
    return float((moved / base.clamp_min(1e-30)).detach())
