"""SIGE: of an edited picture only the edited tiles are computed, the rest is the original's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.cache.edited import edits
from hasten.cache.hold import first_tensor, same
from hasten.cache.original import FAINTEST, Call, Edit, Original, State
from hasten.cache.tiles import grow
from hasten.halves import instead, said
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch

PLACE = "hasten_original"
"""Under this name the network holds what its layers share."""


class Sige(Method):
    """Computes, of an edited picture, the tiles around the edit, in every convolution and for the tokens of every
    transformer block; the rest is what the same layer returned at the same step for the original, and so are the
    statistics of group norms. Li et al. 2022, arXiv:2211.02048, and the authors' code.

    The original is the first picture that is drawn to its end, or what is drawn within `recording`; later ones are its
    edits: pictures with the same prompt, steps, strength and seed from another image or other latents. What was edited
    is found by the network's input: at the first step where it differs from the original's by more than `threshold` of
    the clean picture's values, later also where a pipeline puts in something new; at each resolution `dilation` pixels
    more are computed. A step with another prompt, time or size, and one of which `most` or more is to be computed, is
    computed in full, and so are those after it. most = 0 changes nothing.

    Where an edit is not computed, its answer is the original's bit for bit; elsewhere it is near what the whole network
    says: changes reach no further than the mask, and keys and values are the original's where nothing was edited. A
    threshold of 0.02 of values in [-1, 1], a dilation of 1 and tiles of 4 are those of the authors' code, which fuses
    norms and activations with its tiles in kernels of its own; here they are computed of the whole image.

    The outputs of all these layers are kept at every step: 0.38 GB a step for Stable Diffusion 1.5 in half precision,
    both branches. The handle says how many bytes, and, under "ran" and "reused", counts multiply-adds. Unlike any other
    cache's, its first step reads what was kept, for another picture than the one that is drawn.
    """

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE, Part.TOKENS})
    systems: ClassVar = ("sige",)
    saves: ClassVar = False
    neutral: ClassVar[dict[str, Any]] = {"most": 0.0}

    original: Literal["", "first"] = Field("", description="first: the first picture drawn, or those in `recording`")
    tile: int = Field(4, ge=1, le=64, description="output pixels a side that are computed together")
    dilation: int = Field(1, ge=0, le=64, description="pixels around the edit, at each resolution")
    threshold: float = Field(0.02, ge=0, le=2, description="of the clean picture's values, what counts as edited")
    most: float = Field(0.6, ge=0, le=1, description="share of the picture from which on a step is computed in full")

    def apply(self, model: nn.Module) -> Patch:
        found = anatomy(model)
        if found.unet is None or any(isinstance(m, nn.Conv3d) for m in model.modules()) or found.attentions("temporal"):
            raise Refused(
                f"cache.sige works on U-Nets that draw pictures, of convolutions and attention; {type(model).__name__} "
                "is none: take cache.interval"
            )
        if self.most == 0:
            return Patch()
        if not self.original:
            raise Refused(
                "cache.sige computes edits of an original picture, which it keeps in memory: set `original` to first, "
                "draw the original, then its edits; for pictures of their own take cache.deep"
            )
        state = State(self.tile, self.dilation)
        with Patch() as patch:
            edits(patch, found, state)
            patch.wrap(model, self._network(patch, state))
            patch.set(model, PLACE, state)
            return patch.keep()

    def _network(self, patch: Patch, state: State) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here, x = now(), first_tensor(args, kwargs)
            if x is None or x.ndim != 4:
                return forward(*args, **kwargs)
            others = [[a for a in args if a is not x], {k: v for k, v in kwargs.items() if v is not x}]
            state.here = (here.branch, here.step)
            if state.records(here):
                return self._record(patch, state, here, x, others, lambda: forward(*args, **kwargs))
            call = self._original(state, here, x, others)
            if call is None:
                return forward(*args, **kwargs)
            assert state.edit.mask is not None
            if not bool(state.edit.mask.any()):
                patch.tally["reused"] += call.cost
                return instead(call.out, call.said.clone())
            out = _as("edit", state, lambda: forward(*args, **kwargs))
            state.edit.touch(said(out), call)
            return out

        return around

    def _record(
        self, patch: Patch, state: State, here: Moment, x: Tensor, others: Any, forward: Callable[[], Any]
    ) -> Any:
        before, kept = patch.tally["ran"], state.original
        kept.begin(here)
        kept.sides.add((x.shape[-2], x.shape[-1]))
        x = x.detach().clone()
        out = _as("record", state, forward)
        kept.calls[state.here] = Call(x, others, out, said(out).detach().clone(), patch.tally["ran"] - before)
        patch.tally["bytes"] = kept.bytes
        return out

    def _original(self, state: State, here: Moment, x: Tensor, others: Any) -> Call | None:
        """The original's call that this one edits, with the mask brought up to date; None where it is computed in
        full."""
        if not state.edit.goes_on(here):
            state.edit = Edit()
        edit, call = state.edit, state.original.calls.get(state.here)
        edit.note(here)
        if call is None or edit.full or x.shape != call.x.shape or x.dtype != call.x.dtype:
            edit.full = True
            return None
        alpha = 1.0 if here.node is None else max(here.node.alpha, FAINTEST)
        edit.look(x, call, self.threshold * alpha)
        assert edit.mask is not None
        edit.full = not same(others, call.others) or float(grow(edit.mask, self.dilation).float().mean()) >= self.most
        return None if edit.full else call


@contextmanager
def recording(network: nn.Module) -> Iterator[Original]:
    """Within this block pictures drawn with a network that cache.sige is on are originals, the last of which stays.

    Raises:
        Refused: cache.sige is not on it.
    """
    state = vars(network).get(PLACE)
    if not isinstance(state, State):
        raise Refused(f"cache.sige is not on this {type(network).__name__}: put a recipe with it on the pipeline first")
    state.original.forget()
    state.asked = True
    try:
        yield state.original
    finally:
        state.asked, state.sealed = False, bool(state.original.calls)


def _as(mode: Literal["record", "edit"], state: State, forward: Callable[[], Any]) -> Any:
    state.mode = mode
    try:
        return forward()
    finally:
        state.mode, state.rows = "plain", None
