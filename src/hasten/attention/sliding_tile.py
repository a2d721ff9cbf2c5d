"""Sliding tile attention: each tile of the picture or video reads the tiles of a window round it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from hasten.attention.blocks import Grid, fit, tiled, window
from hasten.attention.words import among_places, computed, ordered
from hasten.kernels.block_sparse import block_attention
from hasten.method import Method, Part, Stage
from hasten.patch import Patch
from hasten.picture import Call
from hasten.places import Places


class SlidingTile(Method):
    """The tokens of a picture or video are cut into tiles of at most `tile` frames, rows and columns (the largest that
    fill the grid), and each tile's queries read the keys of a window of `window_t` x `window_y` x `window_x` tiles
    round it; at a border the window stops there. Tiles are whole blocks, so that what is outside is not computed. Zhang
    et al. 2025, arXiv:2502.04507. Words that attend with the picture are read by all, and read all. A window of 100
    tiles each way changes nothing.

    The authors search a window for each head on a model of theirs; here one serves all.
    """

    stage: ClassVar = Stage.ATTENTION
    writes: ClassVar = frozenset({Part.ATTENTION})
    systems: ClassVar = ("sparse-attention",)
    neutral: ClassVar[dict[str, Any]] = {"window_t": 100, "window_y": 100, "window_x": 100}
    from_tokens: ClassVar = 2048

    window_t: int = Field(3, ge=1, le=100, json_schema_extra={"high": 5})
    window_y: int = Field(3, ge=1, le=100, json_schema_extra={"high": 5})
    window_x: int = Field(3, ge=1, le=100, json_schema_extra={"high": 5})
    tile_t: int = Field(6, ge=1, le=16)
    tile_y: int = Field(8, ge=1, le=32)
    tile_x: int = Field(8, ge=1, le=32)

    def apply(self, model: nn.Module) -> Patch:
        return computed(model, "attention.sliding_tile", self._compute if not self.is_neutral() else None)

    def _compute(self, places: Places, names: tuple[str, ...], call: Call) -> Tensor:
        grid, device = places.grid(call.at.stop - call.at.start), call.query.device
        tile: Grid = (fit(grid[0], self.tile_t), fit(grid[1], self.tile_y), fit(grid[2], self.tile_x))
        tiles: Grid = (grid[0] // tile[0], grid[1] // tile[1], grid[2] // tile[2])
        size = math.prod(tile)
        near = window(tiles, (self.window_t, self.window_y, self.window_x), device)
        if near.shape[1] == near.shape[0]:  # the window sees it all
            return call.run()

        def attend(q: Tensor, k: Tensor, v: Tensor, tail: int, bias: Tensor | None) -> Tensor:
            return block_attention(q, k, v, near[None, None], (size, size), tail, bias)

        return among_places(call, ordered(attend, tiled(grid, tile, device)))
