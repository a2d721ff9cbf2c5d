"""ToMe for Stable Diffusion: like tokens are merged before attention, and what came out is copied back to each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.method import Method, Part, Refused, Stage
from hasten.patch import Patch
from hasten.places import Places, Spot, generator, spots
from hasten.tokens.matching import Pairs, destinations, match
from hasten.tokens.within import Side, Within

WORDS = ("ff_context", "txt_mlp")
"""Feed-forwards that see words alone."""


class Merge(Method):
    """Before attention, `ratio` of the tokens go: one token of each `window_y` x `window_x` window is a destination,
    and of the others those that are most like one (cosine of the block's input) are averaged into it; after attention
    each gets back what was computed for its destination. Bolya & Hoffman 2023, arXiv:2303.17604 sec. 3.1 and 4, as in
    the authors' package tomesd. Attention then costs (1 - ratio)^2. ratio = 0 changes nothing.

    It acts on the resolutions that attend, down to `max_downsample` times coarser than the finest of them; by default
    on self-attention alone, which the paper found best. Destinations are drawn anew in each block at each evaluation,
    from `seed`: the same for every row of the batch, on both branches and in every picture.

    Where positions turn queries and keys (Flux, Qwen-Image, HunyuanDiT), it is those and the values that are averaged,
    after the turn: the projections are not saved there.
    """

    stage: ClassVar = Stage.TOKENS
    writes: ClassVar = frozenset({Part.TOKENS})
    systems: ClassVar = ("tome-sd",)
    neutral: ClassVar[dict[str, Any]] = {"ratio": 0.0}
    from_tokens: ClassVar = 1024

    ratio: float = Field(0.5, ge=0, le=0.9, description="share of the tokens that go; 1 - 1 / window at the most")
    max_downsample: int = Field(1, ge=1, le=8, description="times coarser than the finest resolution that attends")
    attention: bool = True
    cross_attention: bool = False
    feed_forward: bool = False
    window_y: int = Field(2, ge=1, le=8)
    window_x: int = Field(2, ge=1, le=8)
    random: Literal["always", "even", "never"] = Field(
        "always", description="even: only in batches of even size, as the authors' package; else the windows' corners"
    )
    seed: int = Field(0, ge=0, le=2**31, json_schema_extra={"fixed": True})

    def apply(self, model: nn.Module) -> Patch:
        found = spots(model, "tokens.merge", of="pictures")
        with Patch() as patch:
            if self.ratio > 0:
                places = Places(patch, model)
                for block in dict.fromkeys(s.block.name for s in found):
                    self._block(patch, places, [s for s in found if s.block.name == block])
            return patch.keep()

    def _block(self, patch: Patch, places: Places, here: list[Spot]) -> None:
        block, rotary = here[0].block, here[0].rotary
        inside = rotary and self.attention
        running = _Running(self, patch, places, here[0].index)

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            running.begin(block.inputs(args, kwargs).x)
            try:
                if not inside:
                    return forward(*args, **kwargs)
                with running.within():
                    return forward(*args, **kwargs)
            finally:
                running.end()

        patch.wrap(block.module, around, traced=not inside)
        if self.attention:
            for spot in here:
                patch.wrap(spot.site.module, running.turned if rotary else running.shorter)
        if self.cross_attention:
            for site in block.attentions:
                if site.kind == "cross":
                    patch.wrap(site.module, running.shorter)
        if self.feed_forward:
            for name, module in block.feed_forwards:
                if name.rpartition(".")[2] not in WORDS:
                    patch.wrap(module, running.shorter)

    def pairs(self, x_BNC: Tensor, grid: tuple[int, int, int], index: int) -> Pairs:
        """The matching of block `index` at this evaluation."""
        draw = self.random == "always" or (self.random == "even" and len(x_BNC) % 2 == 0)
        rng = generator(self.seed, index) if draw else None
        into_D = destinations(grid, (1, self.window_y, self.window_x), rng)
        return match(x_BNC, into_D, int(x_BNC.shape[1] * self.ratio))


class _Running:
    """One block, while it runs: its matching, and what the modules within do with it."""

    def __init__(self, method: Merge, patch: Patch, places: Places, index: int) -> None:
        self._method, self._patch, self._places, self._index = method, patch, places, index
        self._pairs: Pairs | None = None
        self._mode: Within | None = None
        self._tokens = 0

    @torch.compiler.disable
    def begin(self, x_BNC: Tensor) -> None:
        self._tokens = x_BNC.shape[1]
        if self._places.level(self._tokens) <= self._method.max_downsample:
            self._pairs = self._method.pairs(x_BNC, self._places.grid(self._tokens), self._index)
            self._patch.tally["tokens merged"] += self._tokens - self._pairs.stay_BM.shape[1]

    def end(self) -> None:
        self._pairs = self._mode = None

    def within(self) -> Within:
        self._mode = Within(self._tokens)
        return self._mode

    def shorter(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a module on fewer tokens: its first argument, and the first of what it returns."""
        pairs = self._pairs
        if pairs is None:
            return forward(*args, **kwargs)
        if any("rotary" in name and value is not None for name, value in kwargs.items()):
            raise Refused(
                "tokens.merge cannot average tokens before an attention to words that turns queries by position: set "
                "cross_attention=false"
            )
        if args:
            args = (pairs.merge(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = pairs.merge(kwargs["hidden_states"])
        out = forward(*args, **kwargs)
        return pairs.unmerge(out) if isinstance(out, Tensor) else (pairs.unmerge(out[0]), *out[1:])

    def turned(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs an attention whose softmax is over fewer tokens."""
        pairs, mode = self._pairs, self._mode
        if pairs is None or mode is None:
            return forward(*args, **kwargs)

        def heads(x_BHNC: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
            count = x_BHNC.shape[1]
            return change(x_BHNC.transpose(1, 2).flatten(2)).unflatten(-1, (count, -1)).transpose(1, 2)

        side = Side(lambda x: heads(x, pairs.merge), lambda y: heads(y, pairs.unmerge), pairs.stay_BM[:, None])
        with mode.on(lambda *_: (side, side)):
            return forward(*args, **kwargs)
