"""Clockwork: a U-Net's low-resolution part by the clock, in between a light adaptor of what it returned last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import UNet, anatomy
from hasten.cache.adaptor import Adaptor, Sizes
from hasten.cache.hold import Decide, Held, first_tensor, hold
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch


class Clockwork(Method):
    """Runs the stages of higher resolution than stage `level` at every step, and what lies below, from stage `level` on
    the way down to its twin on the way up, at every `clock`-th. In between an adaptor says what that part returns:
    the identity on what it returned last, which needs no training, or a small network. clock = 1 changes nothing.
    Habibian et al. 2023, arXiv:2312.08128 sec. 4: the adaptor sec. 4.1 and 4.2, the clock sec. 4.3.

    Level 1 is the paper's cut, after the first downsampling. A trained adaptor is for one network, solver, number of
    steps and level (its sec. 6): draw pictures under `watch`, train with `objectives.distill.clockwork`, and name its
    file. Where the clock is above 2, it goes on from its own last output.

    Two things are not the paper's: the prompt's embedding is the mean of its words', not one pooled by another model,
    which by its table 5 changes nothing; r_in is brought to the size of r_out, where the paper does not say how.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})
    systems: ClassVar = ("clockwork",)
    neutral: ClassVar[dict[str, Any]] = {"clock": 1}

    clock: int = Field(2, ge=1, le=20, json_schema_extra={"high": 6})
    level: int = Field(1, ge=1, le=10)
    adaptor: str = Field("", description="a .safetensors file of a trained adaptor; empty: the identity")

    def apply(self, model: nn.Module) -> Patch:
        modules = below(model, self.level)
        adaptor = self._adaptor()
        with Patch() as patch:
            if self.clock > 1:
                for module in modules if adaptor is None else modules[:-1]:
                    hold(patch, module, self.between)
                if adaptor is not None:
                    _adapt(patch, modules[-1], adaptor, self.between, _note(patch, model, modules[0]))
            return patch.keep()

    def between(self, here: Moment) -> bool:
        """Whether the adaptor stands in: C(t) = 1 in the paper."""
        return here.step % self.clock != 0

    def _adaptor(self) -> Adaptor | None:
        if not self.adaptor:
            return None
        try:
            found = Adaptor.read(self.adaptor).requires_grad_(False)
        except ValueError as reason:
            raise Refused(f"cache.clockwork: {reason}") from None
        if found.sizes.level != self.level:
            raise Refused(f"the adaptor in {self.adaptor} is for level {found.sizes.level}: set level to that")
        return found


def below(model: nn.Module, level: int) -> list[nn.Module]:
    """The low-resolution part of a U-Net, in the order that it runs: stages from `level` on, the middle, and as many
    stages back up. Raises Refused where there is none."""
    unet: UNet | None = anatomy(model).unet
    if unet is None:
        raise Refused(
            f"cache.clockwork works on U-Nets, whose low-resolution part can rest; {type(model).__name__} is none: "
            "take cache.interval"
        )
    if level >= min(len(unet.down), len(unet.up)):
        raise Refused(
            f"{type(model).__name__} has {len(unet.down)} stages, 0 to {len(unet.down) - 1}, so nothing lies below "
            f"level {level}: take a lower level, or cache.deep"
        )
    down, up = unet.down[level:], unet.up[: len(unet.up) - level]
    middle = [unet.middle] if unet.middle is not None else []
    return [*(s.module for s in down), *middle, *(s.module for s in up)]


@dataclass
class _Noted:
    """What reaches the low-resolution part at the running step: r_in, the embedding of the time and the words."""

    r_in: Tensor | None = None
    temb: Tensor | None = None
    words: Tensor | None = None

    def given(self, model: str = "this network") -> tuple[Tensor, Tensor, Tensor | None]:
        """(r_in [B, C, h, w], temb [B, T], text [B, D] or None). Raises Refused where the network gives none such."""
        if self.r_in is None or self.r_in.ndim != 4 or self.temb is None or self.temb.ndim != 2:
            raise Refused(f"{model} gives its stages no picture and time apart: leave `adaptor` empty")
        rows = len(self.r_in)
        text = None if self.words is None or self.words.ndim != 3 else self.words.mean(1)
        if len(self.temb) != rows or (text is not None and len(text) != rows):
            raise Refused(f"{model} draws frames, for which there is no trained adaptor: leave `adaptor` empty")
        return self.r_in, self.temb, text


def _note(patch: Patch, model: nn.Module, first: nn.Module) -> _Noted:
    """Keeps what reaches the low-resolution part up to date."""
    noted = _Noted()

    def network(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        words = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        noted.words = words if isinstance(words, Tensor) else None
        return forward(*args, **kwargs)

    def stage(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        noted.r_in = first_tensor(args, kwargs)
        noted.temb = kwargs.get("temb", args[1] if len(args) > 1 else None)
        return forward(*args, **kwargs)

    patch.wrap(model, network)
    patch.wrap(first, stage, traced=False)
    return noted


def _adapt(patch: Patch, last: nn.Module, adaptor: Adaptor, decide: Decide, noted: _Noted) -> None:
    """Makes the stage whose output is r_out run, or, where `decide` says so, `adaptor` in its place."""
    kept: dict[str, Held] = {}

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here, x = now(), first_tensor(args, kwargs)
        held = kept.pop(here.branch, None)  # where the forward raises, nothing stale is left
        if held is not None and held.usable(here, x) and decide(here):
            if Held.of(here, x, held.out).versions != held.versions:
                raise Refused(
                    f"what a {type(last).__name__} returned was written into afterwards, as FreeU does, so it can't be "
                    "adapted: call pipe.disable_freeu(), or leave the cache out"
                )
            out = _adapted(adaptor, held.out, noted)
            patch.tally["reused"] += 1
        else:
            out = forward(*args, **kwargs)
            patch.tally["ran"] += 1
        kept[here.branch] = Held.of(here, x, out)
        return out

    patch.wrap(last, around, traced=False)


def _adapted(adaptor: Adaptor, before: Tensor, noted: _Noted) -> Tensor:
    r_in, temb, text = noted.given()
    sizes = Sizes.of(adaptor.sizes.level, r_in, before, temb, text, adaptor.sizes.width)
    if sizes != adaptor.sizes:
        raise Refused(f"this adaptor is for {adaptor.sizes} and here are {sizes}: train one on this network")
    return adaptor.to(before.device, before.dtype)(r_in, before, temb, text)


@dataclass
class Trajectories:
    """What an adaptor learns from, of every step at which it will stand in: one row a picture and branch.

    Attributes:
        level: of the part that was watched.
        rows: by name, a tensor for each call of the network: "r_in", "r_out", "before" (r_out of the step before),
            "temb", and "text" where the network is given words.
    """

    level: int
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, **given: Tensor | None) -> None:
        """The rows of one call."""
        for name, value in given.items():
            if value is not None:
                self.rows.setdefault(name, []).append(value.detach().clone())

    def adaptor(self, width: int = 64) -> Adaptor:
        """A fresh one for these features. Raises ValueError where nothing was seen."""
        one = {name: values[0] for name, values in self.rows.items()}
        if not one:
            raise ValueError("nothing was watched yet: draw pictures, of two or more steps, while `watch` is on")
        sizes = Sizes.of(self.level, one["r_in"], one["before"], one["temb"], one.get("text"), width)
        return Adaptor(sizes)

    def batch(self, size: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
        """Batches of `size` rows drawn at random, for `hasten.train`."""
        whole = {name: torch.cat(values).float() for name, values in self.rows.items()}

        def draw(_: int, rng: torch.Generator) -> dict[str, Tensor]:
            at = torch.randint(len(whole["r_out"]), (size,), generator=rng, device=rng.device).to(whole["r_out"].device)
            return {name: value[at] for name, value in whole.items()}

        return draw


def watch(model: nn.Module, method: Clockwork) -> tuple[Patch, Trajectories]:
    """Watches an untouched network unroll its trajectories from noise, and keeps what an adaptor learns from (arXiv:
    2312.08128 sec. 4.4 and alg. 1: no data, only prompts). Draw pictures with the recipe that is to be sped up; then
    take the patch off. In a pipeline it goes on before the handle, whose clock then tells it the moment. Raises Refused
    as `method` does."""
    modules = below(model, method.level)
    found, before = Trajectories(method.level), dict[str, Held]()

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here, x = now(), first_tensor(args, kwargs)
        held = before.pop(here.branch, None)
        out = forward(*args, **kwargs)
        if held is not None and held.usable(here, x) and held.moment.step + 1 == here.step and method.between(here):
            r_in, temb, text = noted.given(type(model).__name__)
            found.add(r_in=r_in, r_out=out, before=held.out, temb=temb, text=text)
        before[here.branch] = Held.of(here, x, out.clone())  # a later stage may write into what it is given
        return out

    with Patch() as patch:
        noted = _note(patch, model, modules[0])
        patch.wrap(modules[-1], around, traced=False)
        return patch.keep(), found
