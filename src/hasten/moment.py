"""Which forward is running: set by whoever drives the loop, read by every cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from hasten.denoiser import Target
from hasten.grid import Node

Branch = Literal["both", "cond", "uncond", "other"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The running forward of a denoiser.

    Attributes:
        step: network evaluations of this trajectory before this one (a two-call solver counts two a step).
        steps: evaluations of the whole trajectory.
        t: time of the state, 1 is noise.
        run: which trajectory; what was kept in another run is never read.
        branch: "both" where one call serves the conditional and the unconditional half of the batch.
        scale: of the pipeline's classifier-free guidance, the s of u + s (c - u); None where nobody said, or where the
            pipeline computes something else.
        node, target: where the state lies (its `end` is the next evaluation's) and what the network says of it; None
            where the scheduler cannot be read.
        sign: -1 where the pipeline negates what its network says.
        ahead: what the scheduler's `timesteps` say for this evaluation and those after it; empty where nobody said.
    """

    step: int = 0
    steps: int = 1
    t: float = 1.0
    run: int = 0
    branch: Branch = "both"
    scale: float | None = None
    node: Node | None = None
    target: Target | None = None
    sign: float = 1.0
    ahead: tuple[float, ...] = ()

    def since(self, then: Moment | None) -> int:
        """Evaluations of this trajectory from `then` to here, 0 in the very same one; -1 where there is no `then` or it
        is another trajectory's."""
        return self.step - then.step if then is not None and then.run == self.run else -1


_NOW: ContextVar[Moment] = ContextVar("hasten_moment")


def now() -> Moment:
    """The moment of the running forward; outside a driven loop, the first step of a trajectory of one."""
    return _NOW.get(Moment())


@contextmanager
def at(moment: Moment) -> Iterator[None]:
    """Within this block, `now()` is `moment`."""
    token = _NOW.set(moment)
    try:
        yield
    finally:
        _NOW.reset(token)
