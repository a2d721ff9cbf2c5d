"""Where the tokens of the running call lie: frames, rows and columns; and the attentions among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hasten.anatomy import JOINT, Anatomy, Block, Site, anatomy
from hasten.method import Refused
from hasten.moment import now
from hasten.patch import Patch

SOFTMAX = {"scaled_dot_product_attention", "dispatch_attention_fn"}
"""What softmax attention calls, by itself or through diffusers."""

Grid = tuple[int, int, int]
"""Frames, rows, columns of a sequence in that order."""


@dataclass(frozen=True)
class Spot:
    """An attention among the picture's places.

    Attributes:
        index: of its block, in the order of the module tree.
        rotary: it turns queries and keys by their positions, so that tokens cannot be averaged before it.
    """

    block: Block
    site: Site
    index: int
    rotary: bool


def spots(model: nn.Module, label: str, of: Literal["any", "pictures", "videos"] = "any") -> list[Spot]:
    """Attentions among the picture's places, alone or together with words.

    Args:
        label: of the method that asks.
        of: what it works on; a video's attention sees all frames at once.

    Raises:
        Refused: there are none, where its tokens lie cannot be told, or it draws something else.
    """
    name, parts = type(model).__name__, anatomy(model)
    if name.startswith(JOINT):
        raise Refused(f"{label} cannot tell words from places in the one stream of {name}: leave it out")
    found = [
        Spot(block, site, i, any("rotary" in p for p in inspect.signature(_code(site.module)).parameters))
        for i, block in enumerate(b for chain in parts.chains for b in chain)
        for site in block.attentions
        if site.kind in ("self", "joint")
    ]
    if not found:
        raise Refused(
            f"{label} works on attention among tokens, and {name} has none in transformer blocks: leave it out"
        )
    for spot in found:
        if not is_softmax(spot.site.module):
            raise Refused(
                f"{label} saves where attention costs tokens squared; that of {spot.site.name} is no softmax: leave "
                "the method out"
            )
    if parts.unet is None and getattr(getattr(model, "config", None), "patch_size", None) is None:
        raise Refused(f"{label} needs tokens in rows and columns, and {name} has no patches of a picture: leave it out")
    if of == "pictures" and is_video(parts):
        raise Refused(f"{label} works on pictures; {name} attends to all frames at once: take tokens.asymmetric")
    if of == "videos" and not is_video(parts):
        raise Refused(
            f"{label} works on attention to all frames at once, and {name} has none: take attention.top_blocks"
        )
    return found


def is_video(parts: Anatomy) -> bool:
    """Its attention sees all frames at once, as that of video transformers; not where time is attended to apart."""
    if parts.unet is not None or parts.attentions("temporal"):
        return False
    return "3D" in type(parts.root).__name__ or any(isinstance(m, nn.Conv3d) for m in parts.root.modules())


class Places:
    """Follows the calls of a network and says how the tokens of a sequence lie. `grid` and `level` hold within a call
    alone."""

    def __init__(self, patch: Patch, model: nn.Module) -> None:
        self.model = model
        self._whole: Grid | None = None
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        parts = anatomy(model)
        self._unet = parts.unet is not None
        attended = [s.name for s in parts.attentions("self", "joint")]
        stages = () if parts.unet is None else parts.unet.down
        self._finest = next((2**i for i, s in enumerate(stages) if any(a.startswith(s.name) for a in attended)), 1)

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._whole = lattice(model, dict(zip(self._names, args, strict=False)) | kwargs)
            return forward(*args, **kwargs)

        patch.wrap(model, around)

    def grid(self, tokens: int) -> Grid:
        """Frames, rows and columns of a sequence of so many tokens. Raises Refused where none fit."""
        return self._find(tokens)[0]

    def level(self, tokens: int) -> int:
        """How much coarser it is than the finest that attends: 1, 2, 4 ..."""
        return self._find(tokens)[1]

    def _find(self, tokens: int) -> tuple[Grid, int]:
        if self._whole is not None:
            frames, rows, columns = self._whole
            for scale in (1, 2, 4, 8, 16, 32) if self._unet else (1,):
                side = -(-rows // scale), -(-columns // scale)
                if side[0] * side[1] == tokens:  # frames may be rows of the batch
                    return (1, *side), max(1, scale // self._finest)
                if frames * side[0] * side[1] == tokens:
                    return (frames, *side), max(1, scale // self._finest)
        raise Refused(
            f"how {tokens} tokens of {type(self.model).__name__} lie in rows and columns cannot be told from "
            f"{self._whole}: leave the method out for this task"
        )


def lattice(model: nn.Module, given: dict[str, Any]) -> Grid | None:
    """Frames, rows and columns of the tokens at the network's finest, from what it was called with; None where nothing
    says."""
    if (ids := given.get("img_ids")) is not None:  # Flux: [N, 3] or [batch, N, 4], columns 1 and 2
        rows, columns = (ids if ids.ndim == 2 else ids[0])[:, 1:3].long().unbind(1)
        return 1, int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
    if shapes := given.get("img_shapes"):  # Qwen-Image: [[(1, rows, columns)], ...]
        while not isinstance(shapes[0], int):
            shapes = shapes[0]
        frames, rows, columns = shapes
        return frames, rows, columns
    named = tuple(given.get(k) for k in ("num_frames", "height", "width"))
    if all(isinstance(n, int) for n in named):  # LTX
        return named  # type: ignore[return-value]
    x = next((given[k] for k in ("sample", "hidden_states") if k in given), None)
    if not isinstance(x, torch.Tensor) or x.ndim < 4:
        return None
    config: Any = getattr(model, "config", None)
    size = getattr(config, "patch_size", None) or 1
    deep, side = (size[0], size[1]) if isinstance(size, list | tuple) else (getattr(config, "patch_size_t", None), size)
    # channels before frames, or after
    frames = 1 if x.ndim == 4 else x.shape[1] * x.shape[2] // config.in_channels
    return max(1, frames // (deep or 1)), x.shape[-2] // side, x.shape[-1] // side


def generator(seed: int, index: int) -> torch.Generator:
    """Random numbers of one block at the evaluation that runs: the same in every trajectory, and on both branches."""
    return torch.Generator().manual_seed(((seed * 65_537 + now().step) * 65_537 + index) % 2**63)


def is_softmax(attention: nn.Module) -> bool:
    """Whether it computes softmax attention, by itself or through diffusers."""
    return bool(SOFTMAX & set(_code(attention).__code__.co_names))


def _code(module: nn.Module) -> Any:
    """The function that computes an attention: its processor's, where it has one."""
    processor = getattr(module, "processor", None)
    return inspect.unwrap(type(module).forward if processor is None else type(processor).__call__)
