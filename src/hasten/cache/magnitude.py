"""MagCache: how fast the residual's magnitude changes tells how many steps it may be reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.cache.residual import Kept, reuse
from hasten.method import Method, Part, Stage
from hasten.moment import Moment
from hasten.patch import Patch


class Magnitude(Method):
    """Reuses the blocks' residual while the error that `ratios` foretell stays within `threshold`, and at most `most`
    steps in a row; the first share `retain` of the steps all run. threshold = 0 changes nothing. Ma et al. 2025
    (MagCache), arXiv:2506.09045 sec. 3.3; see `plan`.

    ratios[t - 1] is gamma_t = mean |r_t| / |r_(t-1)| over tokens, one for each step after the first; for another number
    of steps the nearest are taken. Where `ratios` is empty, they are measured, for each branch, on the first trajectory
    that comes to its end: it runs in full, is drawn as without the method, and is told as "measured" in the tally.
    `record` measures what can be stored. Where a network has several chains of blocks, gamma is their mean.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    neutral: ClassVar[dict[str, Any]] = {"threshold": 0.0}

    threshold: float = Field(0.12, ge=0, le=10, json_schema_extra={"high": 0.5})
    most: int = Field(3, ge=1, le=20)
    retain: float = Field(0.2, ge=0, le=1, json_schema_extra={"high": 0.5})
    ratios: tuple[float, ...] = Field((), strict=False)

    def apply(self, model: nn.Module) -> Patch:
        with Patch() as patch:
            if self.threshold > 0:
                chains = anatomy(model).chains
                meter = Meter(len(chains), patch.tally)

                def decide(here: Moment) -> bool:
                    known = self.ratios or meter.done.get(here.branch, ())
                    return bool(known) and self._spares(known, here)

                for chain in chains:
                    reuse(patch, chain, decide, taken=None if self.ratios else meter.taken)
            return patch.keep()

    def _spares(self, ratios: tuple[float, ...], here: Moment) -> bool:
        spared = plan(stretched(ratios, here.steps - 1), self.threshold, self.most, self.retain)
        return here.step < len(spared) and spared[here.step]


@lru_cache(maxsize=64)
def plan(ratios: tuple[float, ...], threshold: float, most: int, retain: float) -> tuple[bool, ...]:
    """Which steps, of one more than there are ratios, are spared.

    Since the last step that ran, the product of gammas g says what the kept residual should be multiplied with: reused
    as it is, it is wrong by |1 - g|. A step is spared while the sum of these errors is at most `threshold` and no more
    than `most` were spared since; else it runs and both start anew. The first round(retain * steps) run.
    """
    steps = len(ratios) + 1
    spared, product, error, row = [False], 1.0, 0.0, 0
    for step, gamma in enumerate(ratios, start=1):
        product, row = product * gamma, row + 1
        error += abs(1 - product)
        fits = step >= int(retain * steps + 0.5) and error <= threshold and row <= most
        if not fits:
            product, error, row = 1.0, 0.0, 0
        spared.append(fits)
    return tuple(spared)


@lru_cache(maxsize=64)
def stretched(ratios: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`count` ratios, each the nearest of those given, ends kept."""
    if count < 2:
        return ratios[-1:] * max(0, count)
    scale = (len(ratios) - 1) / (count - 1)
    return tuple(ratios[int(i * scale + 0.5)] for i in range(count))


def ratio(new: Tensor, old: Tensor) -> float:
    """Mean over tokens of |new| / |old|; tokens whose old magnitude is zero are left out, 1 where all are.

    Args:
        new, old: residuals, [B, N, C], or images and videos, [B, C, ...].
    """
    channels = 1 if new.ndim > 3 else -1
    a, b = new.float().norm(dim=channels), old.float().norm(dim=channels)
    return float((a / b)[b > 0].mean()) if bool((b > 0).any()) else 1.0


@dataclass
class Meter:
    """Measures the ratios of each branch on the first trajectory that comes to its end.

    Attributes:
        chains: how many report.
        tally: counts the trajectories measured.
        done: what was measured, by branch.
    """

    chains: int
    tally: Counter[str]
    done: dict[str, tuple[float, ...]] = field(default_factory=dict)
    going: dict[str, tuple[int, dict[int, list[float]]]] = field(default_factory=dict)

    def taken(self, fresh: Kept, before: Kept | None) -> None:
        """Told of a chain's residual and the one before it."""
        here = fresh.moment
        if here.branch in self.done or before is None or here.since(before.moment) != 1 or not before.alike(fresh):
            return
        run, found = self.going.get(here.branch, (here.run, {}))
        found = found if run == here.run else {}
        self.going[here.branch] = here.run, found
        found.setdefault(here.step, []).append(ratio(fresh.x, before.x))
        steps = range(1, here.steps)
        if here.step == here.steps - 1 and all(len(found.get(s, ())) == self.chains for s in steps):
            self.done[here.branch] = tuple(sum(found[s]) / self.chains for s in steps)
            self.tally["measured"] += 1


def mean(measured: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """One list of ratios from those of several branches or trajectories, all of one length."""
    return tuple(float(v) for v in torch.tensor([list(m) for m in measured], dtype=torch.float64).mean(0))


def record(model: nn.Module) -> tuple[Patch, Meter]:
    """Measures without sparing anything; the meter's `done` has the ratios of each branch, `mean` makes one setting of
    them. In a pipeline it goes on before the handle, whose clock then tells it the moment."""
    chains = anatomy(model).chains
    with Patch() as patch:
        meter = Meter(len(chains), patch.tally)
        for chain in chains:
            reuse(patch, chain, lambda here: False, taken=meter.taken)
        return patch.keep(), meter


def recorder(model: nn.Module, method: Magnitude) -> tuple[Patch, Callable[[], Magnitude]]:
    """`record`, and what then gives `method` with the ratios measured."""
    patch, meter = record(model)

    def found() -> Magnitude:
        if not meter.done:
            raise ValueError("no trajectory of two steps or more came to its end: draw whole pictures")
        return Magnitude(**{**dict(method), "ratios": mean(list(meter.done.values()))})

    return patch, found
