"""Blocks run at planned steps only, which `hasten fit --cache` finds for a model."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from hasten.anatomy import anatomy
from hasten.cache.deep import inside
from hasten.cache.hold import Decide, hold
from hasten.cache.residual import Kept, Predict, Taken, combined, latest, reuse
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment
from hasten.patch import Patch


class Planned(Method):
    """Runs the blocks at the evaluations in `compute`; at the others the last residuals are added, the newest first,
    each times its number in `mix` of that evaluation, or without a mix the last one as it is. In a U-Net, what lies
    inside skip `branch` gives its last output. An empty plan changes nothing.

    A plan is for one model, one number of evaluations and one solver. `hasten fit MODEL --cache 0.05` measures what
    each reuse costs and chooses the steps by dynamic programming (`fit/reuse.py`).
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    saves: ClassVar = False
    neutral: ClassVar[dict[str, Any]] = {"compute": (), "steps": 0}

    compute: Annotated[tuple[int, ...], Field(strict=False, description="evaluations that run, rising from 0")] = ()
    steps: int = Field(0, ge=0, le=10_000, description="evaluations of a picture that the plan is for")
    mix: Annotated[
        tuple[Annotated[tuple[float, ...], Field(strict=False, min_length=1, max_length=2)], ...],
        Field(strict=False, description="of each evaluation: weights of the last residuals, the newest first"),
    ] = ()
    branch: int = Field(0, ge=0, le=30, description="of a U-Net: the skip that stays outside")

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        plan = self.compute
        if plan and (plan[0] != 0 or list(plan) != sorted(set(plan)) or plan[-1] >= self.steps):
            raise ValueError(f"compute rises from 0 and ends below steps ({self.steps}); given {list(plan)}")
        if self.mix and len(self.mix) != self.steps:
            raise ValueError(f"mix has weights for each of the {self.steps} evaluations; given {len(self.mix)}")
        return self

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            if self.compute:
                if self.mix and anatomy(model).unet is not None:
                    raise Refused(
                        f"a plan with a mix is for transformers, and {type(model).__name__} is a U-Net: fit anew"
                    )
                reused(patch, model, self._between, self.branch, self._mixed if self.mix else latest)
            return patch.keep()

    def _between(self, here: Moment) -> bool:
        if here.steps != self.steps:
            raise Refused(
                f"this plan of cache.planned is for {self.steps} network evaluations a picture and here are "
                f"{here.steps}: ask for as many steps, or fit again"
            )
        return here.step not in self.compute

    def _mixed(self, history: tuple[Kept, ...], here: Moment) -> Kept:
        weights = self.mix[here.step]
        return combined(weights, history) if len(weights) <= len(history) else history[0]


def reused(
    patch: Patch, model: nn.Module, decide: Decide, branch: int = 0, predict: Predict = latest,
    taken: Taken | None = None,
) -> None:  # fmt: skip
    """Makes a network reuse what `decide` says, as `Planned` does; of a transformer `predict` has the last two
    residuals, and `taken` is told of each. Raises Refused where nothing can be."""
    found = anatomy(model)
    if found.unet is None:
        for chain in found.chains:
            reuse(patch, chain, decide, predict, memory=2, taken=taken)
        return
    modules = list(inside(found.unet, branch))
    if not modules:
        raise Refused(f"skip {branch} of {type(model).__name__} is not there: take a lower branch")
    for module in modules:
        hold(patch, module, decide)
