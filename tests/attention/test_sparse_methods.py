"""Sparse attention inside networks, against dense attention under the mask that says the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES
from hasten import Recipe, accelerate
from hasten.attention.blocks import band, frames, place_major
from hasten.attention.sliding_tile import SlidingTile
from hasten.attention.spatial_temporal import SpatialTemporal, spatial_heads, two_ways
from hasten.attention.top_blocks import TopBlocks
from hasten.kernels.block_sparse import seen_keys
from hasten.method import Refused

pytestmark = pytest.mark.system("sparse-attention")

GRID = (4, 4, 6)
TOKENS = 96


class Video(nn.Module):
    """One attention over all frames, whose input tokens are its queries, keys and values, two heads of them."""

    def __init__(self, words: Tensor | None = None) -> None:
        super().__init__()
        self.config = type("Config", (), {"patch_size": (1, 1, 1), "in_channels": 8})
        self.patch = nn.Conv3d(8, 8, 1)
        self.blocks = nn.ModuleList([Block(words)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.blocks[0](hidden_states.flatten(2).transpose(1, 2))


class Block(nn.Module):
    def __init__(self, words: Tensor | None) -> None:
        super().__init__()
        self.attn1 = Attention(words)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.attn1(hidden_states)


class Attention(nn.Module):
    def __init__(self, words: Tensor | None) -> None:
        super().__init__()
        self.words = words

    def forward(self, x: Tensor) -> Tensor:
        if self.words is not None:
            x = torch.cat([self.words.expand(len(x), -1, -1), x], dim=1)
        q = x.unflatten(2, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(3 * q, 2 * q, q).transpose(1, 2).flatten(2)


def run(method: Any, net: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Output and floating point operations."""
    patch = method.apply(net)
    try:
        with FlopCounterMode(display=False) as counter:
            out = net(x)
        return out, counter.get_total_flops()
    finally:
        patch.remove()


def video() -> Tensor:
    return torch.randn(2, 8, *GRID, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def where() -> list[tuple[int, int, int]]:
    return list(itertools.product(*map(range, GRID)))


@pytest.mark.parametrize("words", [0, 3])
def test_a_sliding_tile_sees_the_tiles_round_it_and_all_words(words: int) -> None:
    told = torch.randn(1, words, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if words else None
    net, x = Video(told).double(), video()
    got, _ = run(SlidingTile(tile_t=2, tile_y=2, tile_x=3, window_t=1, window_y=1, window_x=2), net, x)
    seen = torch.ones(words + TOKENS, words + TOKENS, dtype=torch.bool)
    for (i, a), (j, b) in itertools.product(enumerate(where()), repeat=2):
        # 2 x 2 x 2 tiles, and a window of 1 x 1 x 2 of them
        seen[words + i, words + j] = a[0] // 2 == b[0] // 2 and a[1] // 2 == b[1] // 2
    y = x.flatten(2).transpose(1, 2)
    y = y if told is None else torch.cat([told.expand(2, -1, -1), y], 1)
    q = y.unflatten(2, (2, 4)).transpose(1, 2)
    want = attend(3 * q, 2 * q, q, seen).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_window_over_everything_is_dense_attention() -> None:
    net, x = Video().double(), video()
    assert torch.equal(run(SlidingTile(window_t=9, window_y=9, window_x=9), net, x)[0], net(x))


def test_the_blocks_that_hold_the_weight_are_enough() -> None:
    """Where each tile's tokens are alike and unlike all others, a few blocks give what all give."""
    net = Video().double()
    rng = torch.Generator().manual_seed(0)
    means = 4 * torch.randn(1, 8, 1, 1, 2, generator=rng, dtype=torch.float64)
    x = means.repeat_interleave(3, 4).expand(2, 8, *GRID) + 0.05 * torch.randn(2, 8, *GRID, generator=rng).double()
    dense = net(x)
    half, flops = run(TopBlocks(keep=0.5, queries=12, keys=12), net, x)
    few, fewer = run(TopBlocks(keep=0.25, queries=12, keys=12), net, x)
    assert (half - dense).abs().max() < 1e-3
    pooled = 2 * 2 * 2 * 8 * 8 * 4  # means of 8 blocks with each other
    attention = 4 * 2 * 2 * TOKENS * TOKENS * 4
    assert (flops, fewer) == (attention / 2 + pooled, attention / 4 + pooled)
    assert (few - dense).abs().mean() > (half - dense).abs().mean()


def planted(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one head, whose queries find the keys of their own frame, or of their own place."""
    rng = torch.Generator().manual_seed(0)
    t, y, x = GRID
    code = torch.randn(t if kind == "spatial" else y * x, 32, generator=rng)
    code = code.repeat_interleave(y * x, 0) if kind == "spatial" else code.repeat(t, 1)
    q = (2 * code)[None, None]
    return q, q.clone(), torch.randn(1, 1, TOKENS, 32, generator=rng)


def test_heads_are_told_apart_by_what_they_look_at() -> None:
    """One head of each kind in one call: both come out as full attention gives them, at half the keys."""
    q, k, v = (torch.cat(pair, 1) for pair in zip(planted("spatial"), planted("temporal")))
    order, spatial = place_major(GRID), frames(GRID, (24, 6), 2)
    temporal = band(len(spatial), 16, spatial.shape[1])
    told = spatial_heads(q, k, v, spatial, temporal, order, (24, 6), 0, None)
    assert told.tolist() == [[True, False]]
    full = attend(q, k, v)
    assert (two_ways(q, k, v, 0, None, GRID, 2, (24, 6)) - full).abs().max() < 1e-2


def test_both_ways_are_masks_in_the_order_of_frames() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=rng, dtype=torch.float64) for n in (TOKENS, TOKENS + 5, TOKENS + 5))
    spatial, order = frames(GRID, (24, 6), 2), place_major(GRID)
    temporal = band(len(spatial), 16, spatial.shape[1])
    within = spatial_heads(q, k, v, spatial, temporal, order, (24, 6), 5, None)
    assert within.any() and not within.all()
    masks = [seen_keys(i[None, None], TOKENS, TOKENS + 5, (24, 6), 5)[0, 0] for i in (spatial, temporal)]
    back = order.argsort()
    masks[1] = masks[1][back][:, torch.cat([back, torch.arange(TOKENS, TOKENS + 5)])]
    seen = torch.where(within[..., None, None], *masks)
    want = attend(q, k, v, seen)
    torch.testing.assert_close(two_ways(q, k, v, 5, None, GRID, 2, (24, 6)), want, rtol=0, atol=1e-12)


def test_it_is_dense_early_on_and_refused_for_pictures() -> None:
    net, x = Video().double(), video()
    assert torch.equal(run(SpatialTemporal(frames=2, dense=0.5), net, x)[0], net(x))  # outside a loop t is 1
    assert not torch.equal(run(SpatialTemporal(frames=2, dense=1.0, queries=24, keys=6), net, x)[0], net(x))
    with pytest.raises(Refused, match=r"take attention\.top_blocks"):
        accelerate(FAMILIES[2].build(), Recipe.from_dict({"methods": ["attention.spatial_temporal"]}))
