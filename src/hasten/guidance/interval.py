"""Guidance only where it matters: one branch elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from hasten import moment
from hasten.halves import Conditional, batch, doubled, half
from hasten.method import Method, Part, Stage
from hasten.moment import now
from hasten.patch import Patch


class Interval(Method):
    """Runs the conditional branch alone while t is outside [low, high], half the work of those steps; [0, 1] changes
    nothing.

    Another guidance goes before it in a recipe's list, so that it too is left out there. (`guidance: {interval}` always
    stands last.)

    Where the pipeline puts both branches in one batch, the conditional half is computed and given for both, so that the
    pipeline's own u + s (c - u) is c; where it calls twice, the second call is given the first's answer. Kynkaanniemi
    et al. 2024, arXiv:2404.07724 eq. 6, in t instead of sigma.
    """

    stage: ClassVar = Stage.GUIDANCE
    writes: ClassVar = frozenset({Part.BATCH})
    neutral: ClassVar[dict[str, Any]] = {"low": 0.0, "high": 1.0}

    low: float = Field(0.2, ge=0, le=1)
    high: float = Field(0.9, ge=0, le=1)

    @model_validator(mode="after")
    def _rises(self) -> Interval:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self

    def apply(self, model: nn.Module) -> Patch:
        cond = Conditional()
        with Patch() as patch:

            def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                here = now()
                if self.low <= here.t <= self.high or here.branch == "other":
                    return forward(*args, **kwargs)
                if here.branch == "both":
                    patch.tally["halved"] += 1
                    with moment.at(replace(here, branch="cond")):
                        size = batch(args, kwargs)
                        return doubled(forward(*half(args, size), **half(kwargs, size)))
                if here.branch == "cond":
                    out = forward(*args, **kwargs)
                    cond.keep(here, out)
                    return out
                if (out := cond.take(here)) is not None:
                    patch.tally["spared"] += 1
                    return out
                return forward(*args, **kwargs)

            patch.wrap(model, around)
            return patch.keep()
