"""Blocks run at planned steps only, which `hasten fit --cache` finds for a model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from hasten.anatomy import anatomy
from hasten.cache.deep import inside
from hasten.cache.hold import Decide, hold
from hasten.cache.residual import reuse
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment
from hasten.patch import Patch


class Planned(Method):
    """Runs the blocks at the evaluations in `compute`; at the others their last residual is added, and in a U-Net what
    lies inside skip `branch` gives its last output. An empty plan changes nothing.

    A plan is for one model, one number of evaluations and one solver. `hasten fit MODEL --cache 0.05` measures what
    each reuse costs and chooses the steps by dynamic programming (`fit/reuse.py`).
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    saves: ClassVar = False
    neutral: ClassVar[dict[str, Any]] = {"compute": (), "steps": 0}

    compute: Annotated[tuple[int, ...], Field(strict=False, description="evaluations that run, rising from 0")] = ()
    steps: int = Field(0, ge=0, le=10_000, description="evaluations of a picture that the plan is for")
    branch: int = Field(0, ge=0, le=30, description="of a U-Net: the skip that stays outside")

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        plan = self.compute
        if plan and (plan[0] != 0 or list(plan) != sorted(set(plan)) or plan[-1] >= self.steps):
            raise ValueError(f"compute rises from 0 and ends below steps ({self.steps}); given {list(plan)}")
        return self

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            if self.compute:
                reused(patch, model, self._between, self.branch)
            return patch.keep()

    def _between(self, here: Moment) -> bool:
        if here.steps != self.steps:
            raise Refused(
                f"this plan of cache.planned is for {self.steps} network evaluations a picture and here are "
                f"{here.steps}: ask for as many steps, or fit again"
            )
        return here.step not in self.compute


def reused(patch: Patch, model: nn.Module, decide: Decide, branch: int = 0) -> None:
    """Makes a network reuse what `decide` says, as `Planned` does. Raises Refused where nothing can be."""
    found = anatomy(model)
    if found.unet is None:
        for chain in found.chains:
            reuse(patch, chain, decide)
        return
    modules = list(inside(found.unet, branch))
    if not modules:
        raise Refused(f"skip {branch} of {type(model).__name__} is not there: take a lower branch")
    for module in modules:
        hold(patch, module, decide)
