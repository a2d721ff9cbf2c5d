"""Tiles against loops over pixels, and convolutions of tiles against the whole one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten.cache.tiles import Window, active, convolve, differs, gather, grow, multiplies, resize, scatter
from hasten.measure.flops import count

pytestmark = pytest.mark.system("sige")

LAYERS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "no padding": {"kernel_size": 3},
    "halving": {"kernel_size": 3, "stride": 2, "padding": 1},
    "halving, unpadded": {"kernel_size": 3, "stride": 2},
    "wide steps": {"kernel_size": 1, "stride": 3},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    "oblong": {"kernel_size": (5, 1), "padding": (2, 0), "stride": (1, 2)},
}
SIDES = [(12, 8), (13, 7), (5, 17)]


def layer(name: str) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 6, **LAYERS[name], dtype=torch.float64)  # type: ignore[arg-type]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def window(module: nn.Conv2d) -> Window:
    found = Window.of(module)
    assert found is not None
    return found


@pytest.mark.parametrize("tile", [1, 3, 4, 64])
@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_all_tiles_are_the_whole_convolution(name: str, side: tuple[int, int], tile: int) -> None:
    module, x = layer(name), randn(2, 4, *side)
    dense = module(x)
    assert window(module).output(side) == dense.shape[-2:]
    tiles = active(torch.ones(side, dtype=torch.bool), window(module), tile)
    assert tiles.side == dense.shape[-2:]
    assert len(tiles) == -(-dense.shape[-2] // tile) * -(-dense.shape[-1] // tile)
    assert (convolve(x, module, tiles, torch.full_like(dense, torch.nan)) - dense).abs().max() < 1e-13


@pytest.mark.parametrize("tile", [1, 3, 4])
@pytest.mark.parametrize("side", SIDES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_what_a_changed_pixel_reaches_is_computed_and_all_else_is_the_bases_bit_for_bit(
    name: str, side: tuple[int, int], tile: int
) -> None:
    """Tiles are active if, and only if, one of their outputs, those past the end counted, reads a pixel of the mask."""
    module, old = layer(name), randn(2, 4, *side)
    w = window(module)
    for seed in range(3):
        mask = torch.rand(side, generator=torch.Generator().manual_seed(seed)) < (0.0, 0.02, 0.1)[seed]
        new = torch.where(mask, randn(2, 4, *side, seed=1), old)
        base, dense = module(old), module(new)
        kept = base.clone()
        tiles = active(mask, w, tile)
        out = convolve(new, module, tiles, base)
        assert (out - dense).abs().max() < 1e-13
        assert torch.equal(base, kept)
        computed = torch.zeros(tiles.side, dtype=torch.bool)
        computed.flatten()[tiles.into] = True
        want = torch.zeros_like(computed)
        for i in range(0, tiles.side[0], tile):
            for j in range(0, tiles.side[1], tile):
                top, left = (a * s - p for a, s, p in zip((i, j), w.stride, w.padding))
                reach = [(tile - 1) * s + k for s, k in zip(w.stride, w.kernel)]
                read = mask[max(0, top) : max(0, top + reach[0]), max(0, left) : max(0, left + reach[1])]
                want[i : i + tile, j : j + tile] = bool(read.any())
        assert torch.equal(computed, want)
        assert torch.equal(out[..., ~computed], base[..., ~computed])
        if not mask.any():
            assert len(tiles) == 0 and torch.equal(out, base) and out.data_ptr() != base.data_ptr()


def test_scatter_puts_back_what_was_gathered() -> None:
    x, mask = randn(2, 3, 9, 10), torch.zeros(9, 10, dtype=torch.bool)
    mask[0, 0] = mask[8, 9] = mask[4, 2] = True
    tiles = active(mask, Window((1, 1), (1, 1), (0, 0)), 4)
    assert len(tiles) == 3
    assert torch.equal(scatter(gather(x, tiles), tiles, x), x)
    zeros = torch.zeros_like(x)
    back = scatter(gather(x, tiles), tiles, zeros)
    assert torch.equal(back[:, :, :4, :4], x[:, :, :4, :4])
    assert torch.equal(back[:, :, 8:, 8:], x[:, :, 8:, 8:])
    assert (back[:, :, 4:8, 4:] == 0).all()
    assert not zeros.any()


def test_what_lies_in_the_padding_reads_as_zero_even_beside_infinity() -> None:
    x = torch.full((1, 1, 4, 4), torch.inf)
    read = gather(x, active(torch.ones(4, 4, dtype=torch.bool), Window((3, 3), (1, 1), (1, 1)), 4))
    assert read.shape == (1, 1, 6, 6)
    assert (read[..., 0, :] == 0).all() and (read[..., :, 5] == 0).all()
    assert torch.equal(read[..., 1:5, 1:5], x)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_multiplies_are_half_the_flops(name: str) -> None:
    module, x = layer(name), randn(2, 4, 12, 8)
    out = module(x)
    assert count(lambda: module(x)) == 2 * multiplies(module, 2 * out[0, 0].numel())
    mask = torch.zeros(12, 8, dtype=torch.bool)
    mask[3, 3] = True
    tiles = active(mask, window(module), 2)
    assert count(lambda: convolve(x, module, tiles, out)) == 2 * multiplies(module, 2 * len(tiles) * 4)


def test_layers_that_pad_with_something_else_have_no_window() -> None:
    assert Window.of(nn.Conv2d(1, 1, 3, padding="same")) is None
    assert Window.of(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")) is None
    assert Window.of(nn.Conv2d(1, 1, 3, padding=2, dilation=2)) == Window((5, 5), (1, 1), (2, 2))


def test_masks_grow_and_change_resolution_by_any_pixel() -> None:
    mask = torch.zeros(9, 12, dtype=torch.bool)
    mask[4, 7] = True
    for by in (0, 1, 3):
        far = [[max(abs(i - 4), abs(j - 7)) <= by for j in range(12)] for i in range(9)]
        assert grow(mask, by).tolist() == far
    assert resize(mask, (3, 3)).nonzero().tolist() == [[1, 1]]
    assert resize(mask, (18, 24)).nonzero().tolist() == [[i, j] for i in (8, 9) for j in (14, 15)]
    assert torch.equal(resize(mask, (9, 12)), mask)


def test_differences_count_in_any_row_and_channel_and_above_the_threshold() -> None:
    x = torch.zeros(2, 3, 2, 2)
    y = x.clone()
    y[1, 2, 0, 1], y[0, 0, 1, 0], y[0, 1, 1, 1] = -0.5, 0.25, torch.nan
    assert differs(x, y, 0.25).tolist() == [[False, True], [False, True]]
    assert differs(x, y, 0.2).tolist() == [[False, True], [True, True]]
    assert not differs(x, x, 0.0).any()
