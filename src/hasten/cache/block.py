"""Block caching: each block runs when it has changed enough since it last ran, by a table that was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from hasten.anatomy import Block as Unit
from hasten.anatomy import Streams, anatomy
from hasten.cache.first_block import change
from hasten.cache.magnitude import stretched
from hasten.cache.residual import Decide, Kept, Predict, latest, reuse
from hasten.cache.shift import Place, Shift, Sums
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch

Table = dict[str, tuple[float, ...]]
"""By name of a block: how far its residual changes from each step to the next, steps - 1 numbers. "*": any other."""


class Block(Method):
    """Runs a block where its residual has changed, since it last ran, by more than `delta` in all; else adds its last
    residual. Each block has a schedule of its own, read off `table` before the picture begins. delta = 0 changes
    nothing. Wimbauer et al. 2023, arXiv:2312.03209: the change eq. 6, the schedule eq. 7, scale and shift sec. 3.4.

    `table` holds what `measure` measured of each block over a run; for another number of steps the nearest entries are
    taken, and a block without a row runs always. The default knows nothing: every block changes by a tenth at every
    step. `shifts` names a file that `fit` made, with a scale and a shift of each channel for each block and step where
    it is spared, made for this schedule and number of steps; without it the residual is added as it is. The paper
    distills them through a linear layer of the time, here they are the least squares of each step.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    systems: ClassVar = ("block-caching",)
    neutral: ClassVar[dict[str, Any]] = {"delta": 0.0}

    delta: float = Field(0.25, ge=0, le=10, json_schema_extra={"high": 1.0})
    table: dict[str, Annotated[tuple[float, ...], Field(strict=False)]] = Field({"*": (0.1,)})
    shifts: str = Field("", description="a .safetensors file of scales and shifts")

    def apply(self, model: nn.Module) -> Patch:
        chains = anatomy(model).chains
        names = {b.name for chain in chains for b in chain}
        if strange := next((n for n in self.table if n != "*" and n not in names), None):
            raise Refused(
                f"cache.block: {type(model).__name__} has no block {strange!r}; its table was measured on another "
                "network: measure this one"
            )
        shift = self._shift()
        with Patch() as patch:
            for unit in (b for chain in chains for b in chain) if self.delta > 0 else ():
                reuse(patch, (unit,), self.spares(unit.name), _moved(shift, unit.name))
            return patch.keep()

    def spares(self, name: str) -> Decide:
        """Whether a block may be spared at a moment, by its row of the table."""
        row = self.table.get(name, self.table.get("*", ()))

        def decide(here: Moment) -> bool:
            spared = schedule(stretched(row, here.steps - 1), self.delta) if row else ()
            return here.step < len(spared) and spared[here.step]

        return decide

    def _shift(self) -> Shift | None:
        try:
            return Shift.read(self.shifts) if self.shifts else None
        except ValueError as reason:
            raise Refused(f"cache.block: {reason}") from None


def _moved(shift: Shift | None, name: str) -> Predict:
    if shift is None:
        return latest

    def predict(history: tuple[Kept, ...], here: Moment) -> Kept:
        kept = history[0]
        c = None if kept.c is None else shift.moved(kept.c, (name, "c", here.step), here.steps)
        return replace(kept, x=shift.moved(kept.x, (name, "x", here.step), here.steps), c=c)

    return predict


@lru_cache(maxsize=4096)
def schedule(changes: tuple[float, ...], delta: float) -> tuple[bool, ...]:
    """Which steps, of one more than there are changes, are spared: those up to which the changes since the last step
    that ran add up to no more than `delta`."""
    spared, total = [False], 0.0
    for moved in changes:
        total += moved
        spared.append(total <= delta)
        total = total if spared[-1] else 0.0
    return tuple(spared)


def table(runs: Sequence[dict[str, dict[int, float]]]) -> Table:
    """The mean over runs of the changes, by block and step, of each; a step that no run measured, as the one before
    it.

    Args:
        runs: one for each trajectory and branch: by name of a block, by step from 1 on, mean |r_t - r_(t-1)| / mean
            |r_(t-1)|.
    """
    found: Table = {}
    for name in dict.fromkeys(n for run in runs for n in run):
        rows = [run[name] for run in runs if name in run]
        steps, row = max(step for r in rows for step in r), list[float]()
        for step in range(1, steps + 1):
            seen = [r[step] for r in rows if step in r]
            row.append(sum(seen) / len(seen) if seen else row[-1] if row else 0.0)
        found[name] = tuple(row)
    return found


@dataclass
class Measured:
    """Changes of every block while an untouched network ran."""

    runs: dict[tuple[int, str], dict[str, dict[int, float]]] = field(default_factory=dict)

    def table(self) -> Table:
        """The setting of cache.block."""
        return table(list(self.runs.values()))


def measure(model: nn.Module) -> tuple[Patch, Measured]:
    """Watches an untouched network, which still gives the same bits: draw some pictures, then take the patch off and
    the `table()`. In a pipeline it goes on before the handle, whose clock then tells it the moment."""
    found = Measured()
    with Patch() as patch:
        for chain in anatomy(model).chains:
            for unit in chain:

                def taken(fresh: Kept, before: Kept | None, name: str = unit.name) -> None:
                    here = fresh.moment
                    if before is not None and here.since(before.moment) == 1 and before.alike(fresh):
                        run = found.runs.setdefault((here.run, here.branch), {})
                        run.setdefault(name, {})[here.step] = change(fresh.x, before.x)

                reuse(patch, (unit,), lambda here: False, taken=taken)
        return patch.keep(), found


@dataclass
class Fitting:
    """Pairs of kept and true residuals, summed up, of every place where the schedule spares a block."""

    steps: int = 0
    at: dict[Place, Sums] = field(default_factory=dict)
    teaching: bool = False

    def shift(self) -> Shift:
        """The least squares' scales and shifts."""
        return Shift(self.steps, {place: sums.solve() for place, sums in self.at.items()})

    def pair(self, name: str, here: Moment, kept: Kept, true: Streams) -> None:
        """A block's kept residual and what it truly adds at this moment."""
        self.steps = here.steps
        for stream, k, t in (("x", kept.x, true.x), ("c", kept.c, true.c)):
            if k is not None and t is not None:
                self.at.setdefault((name, stream, here.step), Sums()).add(k, t)


def fit(model: nn.Module, method: Block) -> tuple[Patch, Fitting]:
    """Pairs what `method` adds with what is true, on the states that it comes to itself (arXiv:2312.03209 sec. 3.4):
    the network answers as under `method`, without scales and shifts; before, at each step where a block is spared, it
    also runs in full on the same input, and what each block then adds is the truth. Draw pictures, all of one number of
    steps; then `shift()` has what `shifts` names once written. In a pipeline it goes on before the handle, as
    `measure` does."""
    found = Fitting()
    units = [b for chain in anatomy(model).chains for b in chain]

    def teach(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(method.spares(u.name)(now()) for u in units):
            found.teaching = True
            try:
                forward(*args, **kwargs)
            finally:
                found.teaching = False
        return forward(*args, **kwargs)

    with Patch() as patch:
        for unit in units:
            _student(patch, unit, method.spares(unit.name), found)
        patch.wrap(model, teach)
        return patch.keep(), found


def _student(patch: Patch, unit: Unit, decide: Decide, found: Fitting) -> None:
    """A block that runs in full, and is paired, while `found.teaching`."""
    last: dict[str, Kept] = {}
    full = unit.module.forward

    def taken(fresh: Kept, _: Kept | None) -> None:
        last[fresh.moment.branch] = fresh

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not found.teaching:
            return forward(*args, **kwargs)
        out, here = full(*args, **kwargs), now()
        kept, start, end = last.get(here.branch), unit.inputs(args, kwargs), unit.outputs(out)
        if kept is not None and kept.usable(here) and kept.x.shape == end.x.shape and decide(here):
            c = end.c - start.c if end.c is not None and start.c is not None else None
            found.pair(unit.name, here, kept, Streams(end.x - start.x, c))
        return out

    reuse(patch, (unit,), decide, taken=taken)
    patch.wrap(unit.module, around)


def recorder(model: nn.Module, method: Block) -> tuple[Patch, Callable[[], Block]]:
    """`measure`, and what then gives `method` with the table measured."""
    patch, found = measure(model)
    return patch, lambda: Block(**{**dict(method), "table": found.table()})
