"""DeepCache: a U-Net's deep features every n-th step, its shallow ones at every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from hasten.anatomy import UNet, anatomy
from hasten.cache.hold import hold
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment
from hasten.patch import Patch


class Deep(Method):
    """Runs the whole U-Net at key steps; in between only what lies outside skip `branch`, on the features that came
    out of the deep part last. Skip 0 is that of the first convolution: all but one layer is saved. Ma et al. 2023,
    arXiv:2312.00858 sec. 3.2, the schedules sec. 3.3 and its appendix. every = 1 changes nothing.

    Key steps are every `every`-th ("uniform"), or as many that lie densest around `centre` ("quadratic").
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    systems: ClassVar = ("deepcache",)
    neutral: ClassVar[dict[str, Any]] = {"every": 1}

    every: int = Field(3, ge=1, le=20)
    branch: int = Field(0, ge=0, le=30)
    schedule: Literal["uniform", "quadratic"] = "uniform"
    centre: float = Field(0.3, ge=0, le=1, description="share of the trajectory around which key steps lie densest")
    power: float = Field(1.4, ge=1, le=4, description="1: evenly; more: denser at the centre")

    def apply(self, model: nn.Module) -> Patch:
        unet = anatomy(model).unet
        if unet is None:
            raise Refused(
                f"cache.deep works on U-Nets, whose skips go round the deep part; {type(model).__name__} has none: "
                "take cache.interval"
            )
        modules = list(inside(unet, self.branch))
        if not modules:
            raise Refused(f"skip {self.branch} of {type(model).__name__} is not there: take a lower branch")
        with Patch() as patch:
            if self.every > 1:
                for module in modules:
                    hold(patch, module, self._between)
            return patch.keep()

    def _between(self, here: Moment) -> bool:
        if self.schedule == "uniform":
            return here.step % self.every != 0
        return here.step not in key_steps(here.steps, self.every, self.centre, self.power)


def inside(unet: UNet, branch: int) -> Iterator[nn.Module]:
    """What runs between the place where skip `branch` is taken and the place where it is read, in the largest whole
    modules: parts of the stages that hold both ends, then the stages between; nothing where there is no such skip.

    Skip 0 is taken before the first stage; each layer and each downsampler takes one more.
    """
    skips = 1 + sum(len(s.layers) + (s.sampler is not None) for s in unet.down)
    if branch >= skips:
        return
    taken = branch  # skips that are still to be taken before the branch
    for stage in unet.down:
        steps = [*stage.layers, *([(stage.sampler,)] if stage.sampler is not None else [])]
        if taken >= len(steps):
            taken -= len(steps)
            continue
        if taken == 0:
            yield stage.module
        else:
            for layer in steps[taken:]:
                yield from layer
        taken = 0
    if unet.middle is not None:
        yield unet.middle
    left = skips - branch - 1  # layers on the way up that read a deeper skip
    for stage in unet.up:
        if left >= len(stage.layers):
            yield stage.module
        else:
            for layer in stage.layers[: max(0, left)]:
                yield from layer
        left -= len(stage.layers)


def key_steps(steps: int, every: int, centre: float, power: float) -> frozenset[int]:
    """About steps / every steps, 0 among them, densest around `centre` * steps: evenly spaced numbers raised to `power`
    on both sides of it."""
    count = max(1, -(-steps // every))
    middle = centre * steps
    low, high = -(middle ** (1 / power)), (steps - middle) ** (1 / power)
    marks = [low + (high - low) * i / count for i in range(count)]
    return frozenset(
        {0, *(min(steps - 1, max(0, int(middle + (abs(m) ** power) * (1 if m > 0 else -1)))) for m in marks)}
    )
