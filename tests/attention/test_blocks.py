"""Which blocks are read, against loops that say it in words."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hasten.attention.blocks import Grid, band, fit, frames, place_major, pooled, scores, tiled, top, window

pytestmark = pytest.mark.system("sparse-attention")


def where(grid: Grid) -> list[tuple[int, int, int]]:
    return list(itertools.product(*map(range, grid)))


@pytest.mark.parametrize(("grid", "tile"), [((1, 4, 6), (1, 2, 3)), ((4, 6, 4), (2, 3, 2))])
def test_the_tokens_of_a_tile_stand_together_and_tiles_stand_in_rows(grid: Grid, tile: Grid) -> None:
    order = tiled(grid, tile).tolist()
    at, size = where(grid), math.prod(tile)
    tiles = [{tuple(p // s for p, s in zip(at[n], tile)) for n in order[i : i + size]} for i in range(0, len(at), size)]
    assert [list(t) for t in tiles] == [[t] for t in where(tuple(n // s for n, s in zip(grid, tile)))]
    assert sorted(order) == list(range(len(at)))


def test_tiles_that_do_not_fill_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        tiled((1, 5, 4), (1, 2, 2))


@pytest.mark.parametrize(("tiles", "size"), [((1, 5, 7), (1, 3, 3)), ((3, 4, 4), (2, 9, 3)), ((2, 3, 4), (1, 1, 1))])
def test_a_window_holds_the_nearest_tiles_each_way_and_as_many_everywhere(tiles: Grid, size: Grid) -> None:
    flat = {t: i for i, t in enumerate(where(tiles))}
    for me, read in zip(where(tiles), window(tiles, size).tolist(), strict=True):
        spans = []
        for at, count, wide in zip(me, tiles, size):
            wide = min(wide, count)
            first = min(max(at - wide // 2, 0), count - wide)
            assert first <= at < first + wide
            spans.append(range(first, first + wide))
        assert sorted(read) == sorted(flat[t] for t in itertools.product(*spans))


def test_means_of_blocks_take_a_ragged_last_one_as_it_is() -> None:
    x = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))
    want = torch.stack([x[:, :, i : i + 4].mean(2) for i in (0, 4, 8)], 2)
    torch.testing.assert_close(pooled(x, 4), want)
    assert torch.equal(pooled(x[:, :, :8], 4), pooled(x, 4)[:, :, :2])


def test_blocks_that_matter_are_found() -> None:
    """Where each block of queries has one block of keys that it points to, that one scores highest, whatever all keys
    have in common."""
    rng = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(8, 16, generator=rng)
    partner = torch.randperm(8, generator=rng)
    k = means.repeat_interleave(4, 0) + 0.1 * torch.randn(32, 16, generator=rng)
    q = means[partner].repeat_interleave(2, 0) + 0.1 * torch.randn(16, 16, generator=rng)
    assert top(q[None, None], k[None, None], 1 / 8, (2, 4))[0, 0, :, 0].tolist() == partner.tolist()
    same = scores(q[None, None], k[None, None] + 100, (2, 4))
    torch.testing.assert_close(same, scores(q[None, None], k[None, None], (2, 4)), rtol=0, atol=2e-3)


@pytest.mark.parametrize(("keep", "count"), [(0.01, 1), (0.5, 4), (0.99, 7), (1.0, 8)])
def test_so_many_different_blocks_are_kept(keep: float, count: int) -> None:
    q = torch.randn(1, 2, 16, 4, generator=torch.Generator().manual_seed(0))
    index = top(q, q, keep, (4, 2))
    assert index.shape == (1, 2, 4, count)
    assert all(len(set(row)) == count for row in index.flatten(0, 2).tolist())


def test_the_order_by_place_has_all_frames_of_a_place_together() -> None:
    at = where((3, 2, 2))
    assert [at[n] for n in place_major((3, 2, 2)).tolist()] == [
        (t, y, x) for y in (0, 1) for x in (0, 1) for t in range(3)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_a_spatial_head_reads_whole_frames_the_first_among_them(count: int) -> None:
    grid, block = (5, 4, 2), (4, 2)
    for i, read in enumerate(frames(grid, block, count).tolist()):
        mine = i * block[0] // 8
        seen = {b * block[1] // 8 for b in read}
        assert len(read) == len(set(read)) == min(count, 5) * 4  # 4 blocks a frame, no frame twice
        assert len(seen) == min(count, 5)
        assert mine in seen
        assert count == 1 or 0 in seen
        others = sorted(seen - {0}) if count > 1 else sorted(seen)
        assert others == list(range(others[0], others[0] + len(others)))


def test_a_band_keeps_to_the_diagonal() -> None:
    assert band(4, 8, 3).tolist() == [[0, 1, 2], [1, 2, 3], [3, 4, 5], [5, 6, 7]]


@pytest.mark.parametrize(("size", "most", "want"), [(64, 8, 8), (45, 8, 5), (7, 4, 1), (3, 9, 3)])
def test_the_largest_divisor(size: int, most: int, want: int) -> None:
    assert fit(size, most) == want
