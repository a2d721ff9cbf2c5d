"""Sparse VideoGen: heads that look within frames, and heads that look along time, told apart as the sampler runs."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.attention.blocks import Grid, band, fit, frames, place_major
from hasten.attention.words import among_places, computed
from hasten.kernels.block_sparse import block_attention
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import now
from hasten.patch import Patch
from hasten.picture import Call
from hasten.places import Places

SAMPLE = 64
"""Queries by which a head is judged, at most."""


class SpatialTemporal(Method):
    """In a video's attention over all frames, each head reads one of two sets of as many keys: `frames` frames, the
    first and those round its own, or its own alone (a spatial head); or in every frame the places round its own (a
    temporal head). Which of the two, some queries tell at every call: the set whose output is nearer to full
    attention's. Xi et al. 2025, arXiv:2502.01776. While t is above `dense`, attention is full, as in the authors' runs.
    frames = 1000 changes nothing.

    Words that attend with the video are read by all, and read all.
    """

    stage: ClassVar = Stage.ATTENTION
    writes: ClassVar = frozenset({Part.ATTENTION})
    systems: ClassVar = ("sparse-attention",)
    neutral: ClassVar[dict[str, Any]] = {"frames": 1000}
    from_tokens: ClassVar = 2048

    frames: int = Field(4, ge=1, le=1000, json_schema_extra={"high": 8})
    dense: float = Field(0.9, ge=0, le=1)
    queries: int = Field(128, ge=1, le=1024, json_schema_extra={"fixed": True}, description="of a block, at most")
    keys: int = Field(64, ge=1, le=1024, json_schema_extra={"fixed": True}, description="of a block, at most")

    def apply(self, model: nn.Module) -> Patch:
        return computed(
            model, "attention.spatial_temporal", self._compute if not self.is_neutral() else None, of="videos"
        )

    def _compute(self, places: Places, names: tuple[str, ...], call: Call) -> Tensor:
        grid = places.grid(call.at.stop - call.at.start)
        if now().t > self.dense or self.frames >= grid[0]:
            return call.run()
        return among_places(call, partial(two_ways, grid=grid, count=self.frames, most=(self.queries, self.keys)))


def two_ways(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, tail: int, bias_BM: Tensor | None, grid: Grid, count: int,
    most: tuple[int, int] = (128, 64),
) -> Tensor:  # fmt: skip
    """Each head's attention, within frames or along time, in blocks of `most` queries and keys, or fewer that fill a
    frame."""
    device, size = q_BHNC.device, grid[1] * grid[2]
    block = fit(size, most[0]), fit(size, most[1])
    spatial = frames(grid, block, count, device)
    temporal = band(spatial.shape[0], size * grid[0] // block[1], spatial.shape[1], device)
    order = place_major(grid, device)
    within = spatial_heads(q_BHNC, k_BHMC, v_BHMC, spatial, temporal, order, block, tail, bias_BM)[..., None]
    order_BHN = torch.where(within, torch.arange(len(order), device=device), order)
    index = torch.where(within[..., None], spatial, temporal)

    def moved(x: Tensor) -> Tensor:
        places = x[:, :, : len(order)].gather(2, order_BHN[..., None].expand(-1, -1, -1, x.shape[-1]))
        return torch.cat([places, x[:, :, len(order) :]], 2)

    if bias_BM is not None and bool((bias_BM[:, : len(order)] != 0).any()):
        raise Refused("a mask over the picture's places is not served by attention.spatial_temporal: leave it out")
    y = block_attention(moved(q_BHNC), moved(k_BHMC), moved(v_BHMC), index, block, tail, bias_BM)
    return y.gather(2, order_BHN.argsort(-1)[..., None].expand(-1, -1, -1, y.shape[-1]))


def spatial_heads(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, spatial: Tensor, temporal: Tensor, order_N: Tensor,
    block: tuple[int, int], tail: int, bias_BM: Tensor | None,
) -> Tensor:  # fmt: skip
    """Of which heads [B, H] some queries, evenly spread, are nearer to full attention by the `spatial` blocks than by
    the `temporal` ones, whose tokens stand in `order_N`; by mean squared error."""
    queries, keys = q_BHNC.shape[2], k_BHMC.shape[2]
    asked = torch.arange(0, queries, max(1, queries // SAMPLE), device=q_BHNC.device)
    bias = 0.0 if bias_BM is None else bias_BM[:, None, None]
    logits = q_BHNC[:, :, asked].float() @ k_BHMC.float().transpose(2, 3) * q_BHNC.shape[-1] ** -0.5 + bias
    full = logits.softmax(-1) @ v_BHMC.float()

    def off(seen: Tensor) -> Tensor:
        y = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v_BHMC.float()
        return (y - full).square().mean((2, 3))

    def rows(index: Tensor, which: Tensor) -> Tensor:
        """Of `seen_keys`, the rows of some queries."""
        chosen = torch.zeros(len(index), (keys - tail) // block[1], dtype=torch.bool, device=index.device)
        wide = chosen.scatter(1, index, True)[which // block[0]].repeat_interleave(block[1], 1)
        return torch.cat([wide, wide.new_ones(len(which), tail)], 1)

    back = order_N.argsort()
    along = rows(temporal, back[asked])
    along = torch.cat([along[:, :queries][:, back], along[:, queries:]], 1)
    return off(rows(spatial, asked)) <= off(along)
