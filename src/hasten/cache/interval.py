"""Blocks run at every n-th step only."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from hasten.anatomy import anatomy
from hasten.cache.residual import reuse
from hasten.method import Method, Part, Stage
from hasten.moment import Moment
from hasten.patch import Patch


class Interval(Method):
    """Runs the blocks every `every` steps and adds their last residual in between. Saves 1 - 1 / every of the blocks'
    time; every = 1 changes nothing. Selvaraju et al. 2024 (FORA), arXiv:2407.01425 sec. 3.2, on chains of blocks."""

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"every": 1}

    every: int = Field(2, ge=1, le=10)

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            if self.every > 1:
                for chain in anatomy(model).chains:
                    reuse(patch, chain, self._between)
            return patch.keep()

    def _between(self, here: Moment) -> bool:
        return here.step % self.every != 0
