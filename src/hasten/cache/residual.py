"""What every residual cache shares: a chain of blocks that runs, or adds a residual made of those it gave last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hasten.anatomy import Block, Streams
from hasten.moment import Moment, now
from hasten.patch import Patch


@dataclass(frozen=True)
class Kept:
    """One branch's residual of one chain, and when it was taken: of the image tokens, and of the context, where the
    chain changes it, else None."""

    moment: Moment
    x: Any
    c: Any
    two: bool

    def usable(self, here: Moment) -> bool:
        """Taken earlier in this very trajectory, on the same branch."""
        return here.since(self.moment) > 0 and self.moment.branch == here.branch

    def alike(self, other: Kept) -> bool:
        """Of the same form: what is made of both has a meaning."""
        return self.x.shape == other.x.shape and self.x.dtype == other.x.dtype


@dataclass
class _State:
    kept: dict[str, tuple[Kept, ...]] = field(default_factory=dict)
    start: Streams | None = None
    skipping: bool = False


Decide = Callable[[Moment], bool]
"""Whether the chain may be spared at this moment."""

Predict = Callable[[tuple[Kept, ...], Moment], Kept]
"""Residuals of this trajectory and branch, the newest first, and where it is now -> the residual that is added."""

Taken = Callable[[Kept, Kept | None], None]
"""Told of each residual that was computed, and of the one before it on its branch, of whatever trajectory."""


def latest(history: tuple[Kept, ...], here: Moment) -> Kept:
    """The last residual as it is."""
    return history[0]


def combined(weights: Sequence[float], history: tuple[Kept, ...]) -> Kept:
    """The sum of the newest residuals, each times its weight."""

    def total(features: list[Any]) -> Any:
        out = weights[0] * features[0]
        for w, f in zip(weights[1:], features[1:], strict=True):
            out = out + w * f
        return out

    some = history[: len(weights)]
    c = None if history[0].c is None else total([k.c for k in some])
    return replace(history[0], x=total([k.x for k in some]), c=c)


def reuse(
    patch: Patch,
    chain: tuple[Block, ...],
    decide: Decide,
    predict: Predict = latest,
    memory: int = 1,
    taken: Taken | None = None,
) -> None:
    """Makes `chain` run, or, where `decide` says so and there is something kept, add what `predict` makes of it.

    A residual is last output minus first input, of the image tokens and, where the chain changes them, of the
    context. It is read only in the trajectory and on the branch it was taken on, so step 0 reads nothing.

    Args:
        memory: residuals kept a branch, for `predict`.
    """
    state = _State()
    first, last = chain[0], chain[-1]

    def around(block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        streams = block.inputs(args, kwargs)
        here = now()
        if block is first:
            history = state.kept.get(here.branch, ())
            kept = history[0] if history else None
            state.skipping = kept is not None and kept.usable(here) and kept.x.shape == streams.x.shape and decide(here)
            patch.tally["reused" if state.skipping else "ran"] += len(chain)
            if state.skipping:
                added = predict(history, here)
                return first.give(_add(streams, added), added.two)
            state.start = streams
        elif state.skipping:
            return block.give(streams, state.kept[here.branch][0].two)
        out = forward(*args, **kwargs)
        if block is last:
            fresh = _taken(here, block, state.start, out)  # type: ignore[arg-type]
            before = state.kept.get(here.branch, ())
            if taken is not None:
                taken(fresh, before[0] if before else None)
            older = tuple(k for k in before if k.usable(here) and k.alike(fresh))
            state.kept[here.branch] = (fresh, *older)[:memory]
            state.start = None
        return out

    for block in chain:
        patch.wrap(block.module, _bound(around, block))


def _bound(around: Callable[..., Any], block: Block) -> Callable[..., Any]:
    return lambda forward, *args, **kwargs: around(block, forward, *args, **kwargs)


def _taken(here: Moment, block: Block, start: Streams, out: Any) -> Kept:
    end = block.outputs(out)
    c = end.c - start.c if end.c is not None and start.c is not None else None
    return Kept(here, end.x - start.x, c, isinstance(out, tuple))


def _add(streams: Streams, kept: Kept) -> Streams:
    c = streams.c if kept.c is None or streams.c is None else streams.c + kept.c
    return Streams(streams.x + kept.x, c)
