"""FasterCache: attention carried on in a line, and the unconditional branch rebuilt from the conditional one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten import moment
from hasten.anatomy import anatomy
from hasten.cache.hold import Form, first_tensor, form
from hasten.halves import Conditional, batch, half, instead, said, split
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch


class Faster(Method):
    """From step s = `start` * steps on, two reuses; `every` = 1 and `full` = 1 change nothing. Lv et al. 2024,
    arXiv:2410.19355.

    Dynamic feature reuse (sec. 3.2): attention over picture and time runs at every `every`-th step; in between it is
    F + (F - F') w, of its last two computed outputs F and F', with w rising in a line from 0 at s to `slope` at the
    end. Attention to the words alone always runs.

    CFG-cache (sec. 3.3, eq. 9-11): both branches run at every `full`-th step. In between the conditional one runs alone
    and the unconditional output is c plus the difference u - c of the last full step, whose low frequencies are weighed
    by 1 + `alpha` in the first half of the trajectory and its high ones by 1 + `alpha` in the second; low are those
    within a fifth of the shorter side of the centre of the spectrum over the last two dimensions, as in the authors'
    code. (That code multiplies again at each step what the equation weighs once.) At a full step attention runs.

    The difference of the branches is the one thing that passes between them. Networks that answer in packed tokens
    (Flux, LTX, Qwen), whose places cannot be told, or in waves, keep both branches.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE, Part.BATCH})
    neutral: ClassVar[dict[str, Any]] = {"every": 1, "full": 1}

    start: float = Field(0.34, ge=0, le=1, description="share of the steps that are left as they are")
    every: int = Field(2, ge=1, le=10, description="steps from one attention to the next")
    slope: float = Field(1.0, ge=0, le=1, description="of the line that attention is carried on, at the end")
    full: int = Field(5, ge=1, le=20, description="steps from one with both branches to the next")
    alpha: float = Field(0.2, ge=0, le=1, description="how much more the kept difference counts")

    def apply(self, model: nn.Module) -> Patch:
        sites = anatomy(model).attentions("self", "temporal", "joint")
        if not sites:
            raise Refused(
                f"cache.faster carries self-attention on, and {type(model).__name__} has none: take cache.interval"
            )
        with Patch() as patch:
            if self.every > 1:
                for site in sites:
                    patch.wrap(site.module, self._attention(patch), traced=False)
            if self.full > 1:
                patch.wrap(model, self._network(patch))
            return patch.keep()

    def first(self, steps: int) -> int:
        """The step at which reuse begins."""
        return round(self.start * steps)

    def whole(self, here: Moment) -> bool:
        """Both branches run."""
        since = here.step - self.first(here.steps)
        return since < 0 or since % self.full == 0

    def weight(self, here: Moment) -> float:
        """w of the line, 0 at the first step of reuse and `slope` at the last of the trajectory."""
        first = self.first(here.steps)
        return self.slope * (here.step - first) / max(1, here.steps - 1 - first)

    def weights(self, here: Moment) -> tuple[float, float]:
        """Of the low and of the high frequencies of the kept difference."""
        early = here.step < here.steps / 2
        return (1 + self.alpha, 1.0) if early else (1.0, 1 + self.alpha)

    def _attention(self, patch: Patch) -> Callable[..., Any]:
        lines: dict[str, _Line] = {}

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here, x = now(), first_tensor(args, kwargs)
            line, since = lines.get(here.branch), here.step - self.first(here.steps)
            between = since > 0 and since % self.every != 0 and (self.full == 1 or not self.whole(here))
            if between and line is not None and line.usable(here, x):
                patch.tally["reused"] += 1
                return carried(line.last, line.before, self.weight(here))
            patch.tally["ran"] += 1
            out = forward(*args, **kwargs)
            views = {here.branch: (x, out)}
            if here.branch == "both":  # for steps at which the conditional rows run alone
                views["cond"] = _second(x), _second(out)
            for branch, (given, gave) in views.items():
                old = lines.get(branch)
                before = old.last if old is not None and old.usable(here, given) else None
                lines[branch] = _Line(here, form(given), gave, before)
            return out

        return around

    def _network(self, patch: Patch) -> Callable[..., Any]:
        state = _Guidance()

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here, x = now(), first_tensor(args, kwargs)
            if here.branch == "both":
                thin = not self.whole(here) and state.usable(here, _second(x))
                if thin:
                    patch.tally["halved"] += 1
                    size = batch(args, kwargs)
                    with moment.at(replace(here, branch="cond")):
                        out = forward(*half(args, size), **half(kwargs, size))
                    c = said(out)
                    return instead(out, torch.cat([state.rebuilt(c, *self.weights(here)), c]))
                state.at = None  # where the call raises, nothing is left
                out = forward(*args, **kwargs)
                state.keep(here, _second(x), *split(said(out)))
                return out
            # another call of the same evaluation, as a guidance makes, leaves it for the unconditional one
            cond = state.cond.take(here) if here.branch == "uncond" else None
            if cond is not None:
                c = said(cond)
                if not self.whole(here) and state.usable(here, x):
                    patch.tally["spared"] += 1
                    return instead(cond, state.rebuilt(c, *self.weights(here)))
                state.at = None
                out = forward(*args, **kwargs)
                state.keep(here, x, said(out), c)
                return out
            out = forward(*args, **kwargs)
            if here.branch == "cond":
                state.cond.keep(here, out)
            return out

        return around


@dataclass(frozen=True, slots=True)
class _Line:
    """An attention's last two computed outputs on one branch."""

    moment: Moment
    form: Form
    last: Any
    before: Any

    def usable(self, here: Moment, x: Tensor | None) -> bool:
        """Taken earlier in this very trajectory, for an input of the same form."""
        return here.since(self.moment) > 0 and self.form == form(x)


@dataclass
class _Guidance:
    """What the unconditional output was above the conditional one at the last full step.

    Attributes:
        at: that step.
        form: of one branch's state.
        difference, low: u - c, and its low frequencies.
        cond: the conditional answer, where the branches are two calls.
    """

    at: Moment | None = None
    form: Form = None
    difference: Tensor | None = None
    low: Tensor | None = None
    cond: Conditional = field(default_factory=Conditional)

    def usable(self, here: Moment, x: Tensor | None) -> bool:
        """Taken earlier in this very trajectory, for a state of the same form."""
        return here.since(self.at) > 0 and self.form == form(x)

    def keep(self, here: Moment, x: Tensor | None, u: Tensor, c: Tensor) -> None:
        if c.ndim < 4:
            return  # packed tokens, or waves
        self.difference = u.float() - c.float()
        self.at, self.form, self.low = here, form(x), low_frequencies(self.difference)

    def rebuilt(self, c: Tensor, low: float, high: float) -> Tensor:
        assert self.difference is not None  # where it is usable
        assert self.low is not None
        return (c.float() + low * self.low + high * (self.difference - self.low)).to(c.dtype)


def low_frequencies(x: Tensor) -> Tensor:
    """The part of x [..., H, W] whose spectrum lies within min(H, W) // 5 of its centre; the rest is x minus it.

    Weighing both parts of a difference so is weighing its spectrum, by linearity: one transform at a full step, none
    at the others.
    """
    height, width = x.shape[-2:]
    ky, kx = (torch.fft.fftfreq(n, 1 / n, device=x.device) for n in (height, width))
    near = ky[:, None] ** 2 + kx**2 <= (min(height, width) // 5) ** 2
    return torch.fft.ifft2(torch.fft.fft2(x) * near).real


def carried(last: Any, before: Any, weight: float) -> Any:
    """last + (last - before) weight, of every tensor in them; `last` where there is none before."""
    if before is None:
        return last
    if isinstance(last, Tensor):
        return last + (last - before) * weight
    if isinstance(last, list | tuple):
        return type(last)(carried(a, b, weight) for a, b in zip(last, before, strict=True))
    return last


def _second(value: Any) -> Any:
    """The second, conditional half of every tensor."""
    if isinstance(value, Tensor):
        return value[len(value) // 2 :]
    return type(value)(_second(v) for v in value) if isinstance(value, list | tuple) else value
