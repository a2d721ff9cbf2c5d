"""T-GATE: cross-attention until the gate, its mean over both branches after, and there one branch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from hasten import moment
from hasten.anatomy import anatomy
from hasten.cache.hold import Form, first_tensor, form, hold
from hasten.halves import Conditional, batch, doubled, half, split
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch


class TGate(Method):
    """Evaluations up to m = `gate` * steps run as they are. Each cross-attention's output at the m-th, the mean of the
    conditional and the unconditional branch's, stands in for it from there on, and the conditional branch alone is
    computed and answered for both: half the rows, and no attention to the words. Before the gate, self-attention may
    run at every `every`-th step only, once `warm` steps are past. Zhang et al. 2024, arXiv:2404.02747: v1 for the gate,
    v3 sec. 4 (and the authors' schedule) for self-attention. gate = 1 and every = 1 change nothing.

    After the gate the words are no longer read there; where a network has them in other places too (the pooled ones of
    Stable Diffusion XL) they are the prompt's, in the authors' pipelines the negative prompt's. Without guidance the
    one branch's own outputs are kept.

    That the mean is of both branches is the method: nothing else passes from one to the other.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE, Part.BATCH})
    systems: ClassVar = ("tgate",)
    neutral: ClassVar[dict[str, Any]] = {"gate": 1.0, "every": 1}

    gate: float = Field(0.4, gt=0, le=1, json_schema_extra={"low": 0.2}, description="share of the steps before it")
    every: int = Field(1, ge=1, le=10, description="steps from one self-attention to the next, before the gate")
    warm: int = Field(2, ge=0, le=100, description="the last step before self-attention is first left out")

    def apply(self, model: nn.Module) -> Patch:
        sites = anatomy(model).attentions("cross")
        if not sites:
            raise Refused(
                f"cache.tgate reuses cross-attention to the words, and {type(model).__name__} has none: take "
                "cache.broadcast for joint attention, and guidance.interval to leave out the second branch"
            )
        with Patch() as patch:
            if self.gate < 1:
                state = _Gate()
                for site in sites:
                    patch.wrap(site.module, _attention(patch, state, site.name), traced=False)
                patch.wrap(model, self._network(patch, state))
            if self.every > 1:
                for site in anatomy(model).attentions("self"):
                    hold(patch, site.module, self._between)
            return patch.keep()

    def last(self, steps: int) -> int:
        """The evaluation at which the outputs are kept: the m-th, counted from 0."""
        return max(1, round(self.gate * steps)) - 1

    def _between(self, here: Moment) -> bool:
        planning = here.step < (self.last(here.steps) if self.gate < 1 else here.steps)
        return planning and here.step > self.warm and here.step % self.every != 0

    def _network(self, patch: Patch, state: _Gate) -> Callable[..., Any]:
        cond = Conditional()

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here = now()
            if here.branch == "other":
                return forward(*args, **kwargs)
            size, x = batch(args, kwargs), first_tensor(args, kwargs)
            x = half(x, size) if here.branch == "both" else x
            if not state.shut(here, x):
                if here.step < self.last(here.steps):
                    return forward(*args, **kwargs)
                return state.keep(here, x, lambda: forward(*args, **kwargs))
            if here.branch == "both":
                patch.tally["halved"] += 1
                with moment.at(replace(here, branch="cond")):
                    return doubled(state.give(lambda: forward(*half(args, size), **half(kwargs, size))))
            if here.branch == "uncond" and (out := cond.take(here)) is not None:
                patch.tally["spared"] += 1
                return out
            out = state.give(lambda: forward(*args, **kwargs))
            if here.branch == "cond":
                cond.keep(here, out)
            return out

        return around


@dataclass
class _Gate:
    """What the attentions gave when it shut, by name, and whether the running forward keeps or gives it.

    Attributes:
        at: the evaluation that it is from.
        branches: those that it is from.
        form: of one branch's state.
    """

    at: Moment | None = None
    branches: tuple[str, ...] = ()
    form: Form = None
    outs: dict[str, Tensor] = field(default_factory=dict)
    mode: Literal["run", "keep", "give"] = "run"

    def shut(self, here: Moment, x: Tensor | None) -> bool:
        """Kept earlier in this very trajectory, for a state of the same form."""
        return here.since(self.at) > 0 and self.form == form(x)

    def keep(self, here: Moment, x: Tensor | None, call: Callable[[], Any]) -> Any:
        again = here.since(self.at) == 0 and self.form == form(x)
        if not again or here.branch in self.branches or "both" in self.branches:
            self.outs, self.branches = {}, ()
        self.at, self.mode = None, "keep"  # where the call raises, nothing is left
        try:
            out = call()
        finally:
            self.mode = "run"
        self.at, self.form, self.branches = here, form(x), (*self.branches, here.branch)
        return out

    def give(self, call: Callable[[], Any]) -> Any:
        self.mode = "give"
        try:
            return call()
        finally:
            self.mode = "run"


def _attention(patch: Patch, state: _Gate, name: str) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if state.mode == "give":
            patch.tally["reused"] += 1
            return state.outs[name]
        patch.tally["ran"] += 1
        out = forward(*args, **kwargs)
        if state.mode == "keep":
            first = state.outs.get(name)
            if now().branch == "both":
                first, second = split(out)
                state.outs[name] = (first + second) / 2
            else:
                state.outs[name] = out if first is None else (first + out) / 2
        return out

    return around
