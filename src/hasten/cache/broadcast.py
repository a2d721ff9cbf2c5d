"""Pyramid attention broadcast: attention at intervals, one for each kind."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from hasten.anatomy import Kind, anatomy
from hasten.cache.hold import Decide, hold
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment
from hasten.patch import Patch


class Broadcast(Method):
    """While low < t < high, attention runs at every n-th step and gives its output again in between; n is `spatial`
    for self-attention within a picture or frame, `temporal` among frames, `cross` to the words, `joint` of picture and
    words together. Zhao et al. 2024, arXiv:2408.12588 sec. 3.2: what changes less, cross-attention before temporal
    before spatial, is given for longer, in the middle of the trajectory. Intervals of 1 change nothing.

    The paper's video networks know three kinds; joint attention holds all of them, and has the shortest interval, as in
    the authors' CogVideoX. Their broadcast of feed-forwards is not here.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"spatial": 1, "temporal": 1, "cross": 1, "joint": 1}

    spatial: int = Field(2, ge=1, le=10)
    temporal: int = Field(4, ge=1, le=10)
    cross: int = Field(6, ge=1, le=10)
    joint: int = Field(2, ge=1, le=10)
    low: float = Field(0.1, ge=0, le=1)
    high: float = Field(0.85, ge=0, le=1)

    @model_validator(mode="after")
    def _rises(self) -> Broadcast:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self

    def apply(self, model: nn.Module) -> Patch:
        sites = anatomy(model).attentions()
        if not sites:
            raise Refused(
                f"cache.broadcast reuses the attention of transformer blocks; {type(model).__name__} has none: take "
                "cache.interval"
            )
        with Patch() as patch:
            for site in sites:
                if (every := self.every(site.kind)) > 1:
                    hold(patch, site.module, self._between(every))
            return patch.keep()

    def every(self, kind: Kind) -> int:
        """The interval of a kind of attention."""
        return {"self": self.spatial, "temporal": self.temporal, "cross": self.cross, "joint": self.joint}[kind]

    def _between(self, every: int) -> Decide:
        def decide(here: Moment) -> bool:
            return self.low < here.t < self.high and here.step % every != 0

        return decide
