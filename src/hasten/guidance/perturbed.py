"""Perturbed-attention guidance: away from pictures without structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from hasten import moment
from hasten.anatomy import ATTENTION, Block, anatomy
from hasten.denoiser import Denoiser
from hasten.guidance.cfg import cfg
from hasten.guidance.identity import Identity
from hasten.halves import batch, half, instead, said, split
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch
from hasten.places import is_softmax

Scale = Annotated[float, Field(ge=0, le=20)]


def perturbed(cond: Denoiser, worse: Denoiser, *, scale: Scale = 3.0) -> Denoiser:
    """c + scale (c - p): away from p, the prediction of the same network whose self-attention, in some layers, is the
    identity (see `blind`), so that what it draws has texture but no structure. scale = 0 changes nothing.

    It needs no condition. Together with classifier-free guidance of scale s it is cfg(perturbed(c, p, scale=scale / s),
    u, scale=s), that is u + s (c - u) + scale (c - p). Ahn et al. 2024, arXiv:2403.17377 sec. 4.

    Two network calls; one at scale 0.
    """
    return cfg(cond, worse, scale=1 + scale)


class Perturbed(Method):
    """Perturbed-attention guidance in a pipeline: u + s (c - u) + `scale` (c - p), or c + scale (c - p) where no
    guidance runs; 0 changes nothing. p is c with identity self-attention in `layers`. Ahn et al. 2024,
    arXiv:2403.17377.

    It costs another call of the network on the conditional rows at every evaluation, counted as "extra" in the
    handle's text. Caches keep that call's state apart.

    layers is "middle", a U-Net's middle block or a transformer's middle one, where the paper finds it best; or a name,
    such as "up_blocks.1" or "transformer_blocks.7", of a block or of what holds some.
    """

    stage: ClassVar = Stage.GUIDANCE
    writes: ClassVar = frozenset({Part.GUIDANCE})
    neutral: ClassVar[dict[str, Any]] = {"scale": 0.0}
    saves: ClassVar = False

    scale: Scale = 3.0
    layers: str = "middle"

    def apply(self, model: nn.Module) -> Patch:
        state = _State()
        with Patch() as patch:
            if self.scale > 0:
                seen = _blinded(patch, chosen(model, self.layers), lambda: state.running)
                patch.wrap(model, self._around(patch, state, seen))
            return patch.keep()

    def _around(self, patch: Patch, state: _State, seen: set[str]) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here, out = now(), forward(*args, **kwargs)
            if here.branch == "other":
                return out
            both = here.branch == "both"
            if here.branch != "uncond":
                c = split(said(out))[1] if both else said(out)
                size = batch(args, kwargs)
                asked = (half(args, size), half(kwargs, size)) if both else (args, kwargs)
                with moment.at(replace(here, branch="other")), state:
                    p = said(forward(*asked[0], **asked[1]))
                _need(seen, self.layers)
                patch.tally["extra"] += 1
                state.moment, state.move = here, self.scale * (c - p)
            if here.since(state.moment) != 0:
                return out
            move = state.move  # added to both branches, so that u + s (c - u) has it once
            return instead(out, said(out) + (torch.cat([move, move]) if both else move))

        return around


@dataclass
class _State:
    """Whether the running forward is the perturbed one, and what it gave at this evaluation."""

    running: bool = False
    moment: Moment | None = None
    move: Any = None

    def __enter__(self) -> None:
        self.running = True

    def __exit__(self, *_: object) -> None:
        self.running = False


def blind(model: nn.Module, layers: str = "middle") -> Patch:
    """Makes the perturbed network of this one, in place: identity self-attention in `layers`, until the patch is
    removed. Raises Refused as `chosen` does, and at the call where no such attention runs."""
    with Patch() as patch:
        seen = _blinded(patch, chosen(model, layers), lambda: True)

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            _need(seen, layers)
            return out

        patch.wrap(model, around)
        return patch.keep()


def _blinded(patch: Patch, blocks: list[Block], when: Callable[[], bool]) -> set[str]:
    """Blinds the blocks while `when` says so; the names of those where it was seen to work."""
    seen: set[str] = set()

    def around(block: Block, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not when():
            return forward(*args, **kwargs)
        # a compiled block would not see the mode
        with torch.compiler.set_stance("force_eager"), Identity(block.inputs(args, kwargs).x.shape[1]) as mode:
            out = forward(*args, **kwargs)
        if mode.met:
            seen.add(block.name)
        return out

    for block in blocks:
        patch.wrap(block.module, lambda forward, *a, block=block, **k: around(block, forward, *a, **k))
    return seen


def _need(seen: set[str], layers: str) -> None:
    if not seen:
        raise Refused(
            f"no self-attention over the picture ran in {layers!r}: name other layers, or leave the method out"
        )


def chosen(model: nn.Module, layers: str) -> list[Block]:
    """The transformer blocks under a name, or in the middle.

    Raises:
        Refused: there are none, or their attention is not the kind whose map can be replaced.
    """
    blocks = [b for b in anatomy(model).blocks if _attention(b) is not None]
    if not blocks:
        raise Refused(
            f"{type(model).__name__} has no transformer blocks, whose attention could be perturbed; leave it out"
        )
    middle = [b for b in blocks if b.name.startswith("mid_block")] or [blocks[len(blocks) // 2]]
    found = middle if layers == "middle" else [b for b in blocks if f"{b.name}.".startswith(f"{layers}.")]
    if not found:
        names = ", ".join(b.name for b in blocks[:4])
        raise Refused(f"{type(model).__name__} has no transformer block {layers!r}; it has {names} and so on")
    for block in found:
        attention: Any = _attention(block)
        processor = getattr(attention, "processor", None)
        if not is_softmax(attention):
            raise Refused(
                f"the attention of {block.name}, {type(processor or attention).__name__}, is no softmax over places "
                "that the identity can replace: name other layers, or leave the method out"
            )
    return found


def _attention(block: Block) -> nn.Module | None:
    return next((m for n in ATTENTION if (m := block.module._modules.get(n)) is not None), None)
