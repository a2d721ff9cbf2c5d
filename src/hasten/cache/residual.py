"""What every residual cache shares: a chain of blocks that runs, or gives its last residual again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hasten.anatomy import Block, Streams
from hasten.moment import Moment, now
from hasten.patch import Patch


@dataclass
class Kept:
    """One branch's residual of one chain, and when it was taken."""

    moment: Moment
    x: Any
    c: Any
    two: bool

    def usable(self, here: Moment) -> bool:
        """Taken earlier in this very trajectory, on the same branch."""
        return self.moment.run == here.run and self.moment.branch == here.branch and self.moment.step < here.step


@dataclass
class _State:
    kept: dict[str, Kept] = field(default_factory=dict)
    start: Streams | None = None
    skipping: bool = False


Decide = Callable[[Moment], bool]
"""Whether the chain may give its residual again at this moment."""


def reuse(patch: Patch, chain: tuple[Block, ...], decide: Decide) -> None:
    """Makes `chain` run, or, where `decide` says so and there is something kept, add what it added last time.

    A residual is last output minus first input, of the image tokens and, where the chain changes them, of the
    context. It is read only in the trajectory and on the branch it was taken on, so step 0 reads nothing.
    """
    state = _State()
    first, last = chain[0], chain[-1]

    def around(block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        streams = block.inputs(args, kwargs)
        here = now()
        if block is first:
            kept = state.kept.get(here.branch)
            state.skipping = kept is not None and kept.usable(here) and kept.x.shape == streams.x.shape and decide(here)
            patch.tally["reused" if state.skipping else "ran"] += len(chain)
            if state.skipping:
                return first.give(_add(streams, kept), kept.two)  # type: ignore[arg-type, union-attr]
            state.start = streams
        elif state.skipping:
            return block.give(streams, state.kept[here.branch].two)
        out = forward(*args, **kwargs)
        if block is last:
            state.kept[here.branch] = _taken(here, block, state.start, out)  # type: ignore[arg-type]
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
