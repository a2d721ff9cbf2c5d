"""ToDo: every query, fewer keys and values, on a coarser grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.method import Method, Part, Refused, Stage
from hasten.patch import Patch
from hasten.places import Places, Spot, spots
from hasten.tokens.matching import take
from hasten.tokens.within import Side, entered


class Downsample(Method):
    """Self-attention reads keys and values from every `factor`-th row and column alone (nearest neighbour), at the
    finest resolution that attends; at the next, from every `second`-th. Queries all stay, so that nothing has to be put
    back. Smith, Saxena & Saha 2024, arXiv:2402.13573 sec. 3: Attention(Q, D(K), D(V)). Attention costs 1 / factor^2 of
    what it did. factor = 1 changes nothing.

    Words that attend with the picture stay.
    """

    stage: ClassVar = Stage.TOKENS
    writes: ClassVar = frozenset({Part.TOKENS})
    systems: ClassVar = ("todo",)
    neutral: ClassVar[dict[str, Any]] = {"factor": 1, "second": 1}
    from_tokens: ClassVar = 1024

    factor: int = Field(2, ge=1, le=8)
    second: int = Field(1, ge=1, le=8)

    def apply(self, model: nn.Module) -> Patch:
        found = spots(model, "tokens.downsample", of="pictures")
        with Patch() as patch:
            if max(self.factor, self.second) > 1:
                places = Places(patch, model)
                for spot in found:
                    if spot.rotary or spot.site.kind == "joint":
                        self._inside(patch, places, spot)
                    else:
                        self._before(patch, places, spot)
            return patch.keep()

    def _kept(self, patch: Patch, places: Places, tokens: int) -> Tensor | None:
        """Which tokens are read; None for all."""
        level = places.level(tokens)
        factor = self.factor if level == 1 else self.second if level == 2 else 1
        if factor == 1:
            return None
        kept = nearest(places.grid(tokens), factor)
        patch.tally["keys dropped"] += tokens - len(kept)
        return kept

    def _before(self, patch: Patch, places: Places, spot: Spot) -> None:
        """Keys and values are projected from fewer tokens."""

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            x_BNC = args[0] if args else kwargs["hidden_states"]
            kept = self._kept(patch, places, x_BNC.shape[1])
            if kept is None:
                return forward(*args, **kwargs)
            if any(
                a is not None for a in (*args[1:], kwargs.get("encoder_hidden_states"), kwargs.get("attention_mask"))
            ):
                raise Refused("self-attention under a mask is not served by tokens.downsample: leave the method out")
            index = kept.to(x_BNC.device).expand(len(x_BNC), -1)
            kwargs["encoder_hidden_states"] = take(x_BNC, index)  # where there is one, keys and values are made from it
            return forward(*args[:1], **kwargs)

        patch.wrap(spot.site.module, around, traced=False)

    def _inside(self, patch: Patch, places: Places, spot: Spot) -> None:
        """Keys and values are dropped after positions have turned them."""
        running = entered(patch, spot.block)

        def attention(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            mode = running[-1]
            kept = self._kept(patch, places, mode.tokens)
            if kept is None:
                return forward(*args, **kwargs)

            def plan(q: Tensor, k: Tensor, v: Tensor, which: int) -> tuple[Side | None, Side | None]:
                index = kept.to(k.device)
                return None, Side(lambda x: x[..., index, :], lambda y: y, index[None, None])

            with mode.on(plan):
                return forward(*args, **kwargs)

        patch.wrap(spot.site.module, attention)


def nearest(grid: tuple[int, int, int], factor: int) -> Tensor:
    """Positions of the tokens, in row-major order, that nearest-neighbour downsampling of each frame keeps: of n rows
    those at floor(i n / m), with m = n // factor rows, one at the least."""
    frames, rows, columns = grid
    at = [torch.arange(m := max(1, n // factor)) * n // m for n in (rows, columns)]
    whole = torch.arange(frames * rows * columns).view(frames, rows, columns)
    return whole[:, at[0]][:, :, at[1]].flatten()
