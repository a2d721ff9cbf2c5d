"""Encoder propagation: a U-Net's encoder at key steps, its decoder at every step, or at several in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.cache.hold import Form, first_tensor, form, same
from hasten.halves import CONTEXT, batch, context
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch

EARLY = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""Key steps of 50: the paper's non-uniform list, densest where the picture is laid out."""

OUTSIDE = ("down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals")
"""What a ControlNet or an adapter makes of the state: it is another at every step."""


class Encoder(Method):
    """Runs the encoder, that is the first convolution, the stages on the way down and the middle, at key steps; at the
    others the decoder alone, on the skips and the middle of the last key step. Li et al. 2023, arXiv:2312.09608 sec.
    3.2. schedule "uniform" with every = 1 changes nothing.

    Key steps are every `every`-th ("uniform"), or the paper's list, stretched to the steps there are ("early"; the list
    is 0, 1, 2, 3, 5, 10, 15, 25, 35 of 50).

    Between key steps the network does not see the state, so that `parallel` runs its decoder for all of them up to the
    next key step at once, as one batch (same section): as many rows more in memory, the same picture to rounding. It
    needs the scheduler's times beforehand; where they, or the other inputs, turn out to be others than planned, or a
    ControlNet adds to the skips, the steps are taken one by one.

    The paper's prior noise, z_t + alpha z_T late in the trajectory (sec. 3.3), is not here: it changes the state that
    the scheduler steps from, which a network's border does not reach.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    systems: ClassVar = ("encoder-propagation",)
    neutral: ClassVar[dict[str, Any]] = {"schedule": "uniform", "every": 1}

    schedule: Literal["uniform", "early"] = "early"
    every: int = Field(3, ge=1, le=20, description="of a uniform schedule: steps from one key step to the next")
    parallel: bool = False

    def apply(self, model: nn.Module) -> Patch:
        unet, into = anatomy(model).unet, getattr(model, "conv_in", None)
        if unet is None or not isinstance(into, nn.Module):
            raise Refused(
                f"cache.encoder works on U-Nets, whose decoder can run on older skips; {type(model).__name__} is none: "
                "take cache.interval"
            )
        with Patch() as patch:
            if self.schedule == "early" or self.every > 1:
                encoder = [into, *(s.module for s in unet.down), *([unet.middle] if unet.middle is not None else [])]
                state = _State(last=len(encoder) - 1)
                for place, module in enumerate(encoder):
                    patch.wrap(module, _part(patch, state, place))
                patch.wrap(model, self._network(patch, state))
            return patch.keep()

    def _network(self, patch: Patch, state: _State) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here, x = now(), first_tensor(args, kwargs)
            kept = state.kept.get(here.branch)
            if kept is None or not kept.usable(here, x) or self._key(here):
                return state.encode(here, x, lambda: forward(*args, **kwargs))
            if (out := kept.planned(here, args, kwargs)) is not None:
                patch.tally["spared"] += 1
                return out
            times = self._until_key(here) if self.parallel and not kept.alone else 1
            stacked = _stacked(args, kwargs, here, times) if times > 1 else None
            if stacked is None:
                return state.decode(kept, 1, lambda: forward(*args, **kwargs))
            out = state.decode(kept, times, lambda: forward(*stacked[0], **stacked[1]))
            rows = batch(args, kwargs)
            kept.plan = {
                here.step + i: (here.ahead[i], _rows(out, i * rows, rows, times * rows)) for i in range(1, times)
            }
            kept.asked = _others(args, kwargs)
            return _rows(out, 0, rows, times * rows)

        return around

    def _key(self, here: Moment) -> bool:
        return here.step in early(here.steps) if self.schedule == "early" else here.step % self.every == 0

    def _until_key(self, here: Moment) -> int:
        """Steps from here on that are none, as far as their times are known."""
        times = 0
        while times < len(here.ahead) and here.step + times < here.steps:
            if self._key(Moment(step=here.step + times, steps=here.steps)):
                break
            times += 1
        return times


def early(steps: int) -> frozenset[int]:
    """The paper's key steps, of as many steps."""
    return frozenset(k * steps // 50 for k in EARLY)


@dataclass
class _Encoded:
    """What the encoder gave at a key step, and what the decoder was asked of it beforehand.

    Attributes:
        parts: outputs, by place in the encoder.
        plan: step -> (what the scheduler calls its time, the network's output).
        asked: the other inputs that the plan was made for.
        alone: a plan did not hold; no other is made.
    """

    moment: Moment
    form: Form
    parts: dict[int, Any] = field(default_factory=dict)
    plan: dict[int, tuple[float, Any]] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    alone: bool = False

    def usable(self, here: Moment, x: Tensor | None) -> bool:
        """Taken earlier in this very trajectory, for an input of the same form."""
        return here.since(self.moment) > 0 and self.form == form(x)

    def planned(self, here: Moment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output computed for this step; None where there is none or what is asked is something else."""
        if here.step not in self.plan:
            return None
        time, out = self.plan.pop(here.step)
        if here.ahead[:1] == (time,) and same(self.asked, _others(args, kwargs)):
            return out
        self.plan, self.alone = {}, True
        return None


@dataclass
class _State:
    """Branch -> what is kept; and what the running forward does: keeps (`into`), gives (`giving`, `times` times in one
    batch), or neither."""

    last: int
    kept: dict[str, _Encoded] = field(default_factory=dict)
    into: _Encoded | None = None
    giving: _Encoded | None = None
    times: int = 1

    def encode(self, here: Moment, x: Tensor | None, call: Callable[[], Any]) -> Any:
        self.kept.pop(here.branch, None)  # where the call raises, nothing is left
        self.into = _Encoded(here, form(x))
        try:
            out = call()
            self.kept[here.branch] = self.into
        finally:
            self.into = None
        return out

    def decode(self, kept: _Encoded, times: int, call: Callable[[], Any]) -> Any:
        self.giving, self.times = kept, times
        try:
            return call()
        finally:
            self.giving, self.times = None, 1


def _part(patch: Patch, state: _State, place: int) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if state.giving is not None:
            patch.tally["reused"] += 1
            return _again(state.giving.parts[place], state.times, place == state.last)
        patch.tally["ran"] += 1
        out = forward(*args, **kwargs)
        if state.into is not None:
            # the decoder may write into what the middle gives it, as FreeU does
            state.into.parts[place] = _again(out, 1, place == state.last)
        return out

    return around


def _again(value: Any, times: int, fresh: bool) -> Any:
    """`value` so many times along the batch, one after the other; `fresh` copies also what is given once."""
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1)) if times > 1 or fresh else value
    return type(value)(_again(v, times, fresh) for v in value) if isinstance(value, list | tuple) else value


def _rows(value: Any, start: int, count: int, size: int) -> Any:
    """Rows of every tensor whose batch is `size`, in the container they came in."""
    if isinstance(value, Tensor):
        return value[start : start + count] if value.ndim > 0 and len(value) == size else value
    if isinstance(value, dict):
        return type(value)(**{k: _rows(v, start, count, size) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_rows(v, start, count, size) for v in value)
    return value


def _others(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All that a U-Net is given besides state and time."""
    return [*args[2:], *(v for k, v in kwargs.items() if k not in ("sample", "timestep"))]


def _stacked(
    args: tuple[Any, ...], kwargs: dict[str, Any], here: Moment, times: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The call for this time and those after it in one batch, time by time; None where that cannot be said."""
    x, t = first_tensor(args, kwargs), args[1] if len(args) > 1 else kwargs.get("timestep")
    if x is None or t is None or any(kwargs.get(name) is not None for name in OUTSIDE):
        return None
    like = t if isinstance(t, Tensor) else torch.tensor(t, device=x.device)
    ahead = torch.tensor(here.ahead[:times], device=like.device).to(like.dtype)
    if not bool((like == ahead[0]).all()):  # it is told in other units
        return None
    ts, size = ahead.repeat_interleave(len(x)), len(x)

    def more(value: Any, rows: int) -> Any:
        if isinstance(value, Tensor):
            return _again(value, times, False) if value.ndim > 0 and len(value) == rows else value
        if isinstance(value, dict):
            return {k: more(v, context(v, size) if k == CONTEXT else size) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(more(v, rows) for v in value)
        return value

    named = {k: ts if k == "timestep" else v for k, v in more(kwargs, size).items()}
    return tuple(ts if i == 1 else more(v, size) for i, v in enumerate(args)), named
