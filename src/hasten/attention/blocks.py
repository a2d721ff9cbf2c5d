"""Which blocks of keys a block of queries reads, and in which order tokens make good blocks. Pure functions.

Letters of shapes: B batch, H heads, N tokens, C channels; I blocks of queries, J of keys, K of them chosen. A grid is
(frames, rows, columns) of the tokens in that order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Grid = tuple[int, int, int]


def fit(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`.

    >>> fit(45, 8), fit(80, 8)
    (5, 8)
    """
    return max(n for n in range(1, min(size, most) + 1) if size % n == 0)


def tiled(grid: Grid, tile: Grid, device: torch.device | None = None) -> Tensor:
    """The order [N] in which the tokens of a tile stand together, tile after tile, both in row-major order. Zhang et
    al. 2025, arXiv:2502.04507 (sliding tile attention): so a window of tiles is a window of whole blocks.

    Raises:
        ValueError: the tiles do not fill the grid.
    """
    if any(n % size for n, size in zip(grid, tile, strict=True)):
        raise ValueError(f"tiles of {tile} do not fill a grid of {grid}")
    (t, y, x), (dt, dy, dx) = grid, tile
    at = torch.arange(t * y * x, device=device).view(t // dt, dt, y // dy, dy, x // dx, dx)
    return at.permute(0, 2, 4, 1, 3, 5).flatten()


def tiles_of(grid: Grid, device: torch.device | None = None) -> Tensor:
    """The order by tiles of at most 8 rows by 8 columns of a picture, or 4 frames by 4 by 4 of a video: neighbours are
    alike, so that their mean says something of each."""
    side, deep = (8, 1) if grid[0] == 1 else (4, 4)
    return tiled(grid, (fit(grid[0], deep), fit(grid[1], side), fit(grid[2], side)), device)


def window(tiles: Grid, size: Grid, device: torch.device | None = None) -> Tensor:
    """The tiles [I, K] of a window of `size` round each of `tiles`, in row-major order; at a border the window stops
    there, so that all have as many. Zhang et al. 2025, arXiv:2502.04507."""
    flat = torch.zeros(1, 1, dtype=torch.long, device=device)
    for count, wide in zip(tiles, size, strict=True):
        wide = min(wide, count)
        first = (torch.arange(count, device=device) - wide // 2).clamp(0, count - wide)
        along = first[:, None] + torch.arange(wide, device=device)
        flat = (flat[:, None, :, None] * count + along[None, :, None, :]).flatten(2).flatten(0, 1)
    return flat


def pooled(x_BHNC: Tensor, size: int) -> Tensor:
    """Mean of each block of `size` tokens, [B, H, blocks, C]; a last one may have fewer."""
    tokens = x_BHNC.shape[2]
    whole = x_BHNC[:, :, : tokens // size * size].unflatten(2, (-1, size)).mean(3)
    rest = x_BHNC[:, :, tokens // size * size :]
    return torch.cat([whole, rest.mean(2, keepdim=True)], 2) if rest.shape[2] else whole


def scores(q_BHNC: Tensor, k_BHMC: Tensor, block: tuple[int, int]) -> Tensor:
    """Logits of mean queries and mean keys, [B, H, I, J], the keys' common mean taken out: it is the same for all.
    Zhang et al. 2025, arXiv:2509.24006, as in the authors' code."""
    keys = k_BHMC - k_BHMC.mean(2, keepdim=True)
    return pooled(q_BHNC, block[0]) @ pooled(keys, block[1]).transpose(2, 3) / math.sqrt(q_BHNC.shape[-1])


def top(q_BHNC: Tensor, k_BHMC: Tensor, keep: float, block: tuple[int, int]) -> Tensor:
    """The share `keep` of blocks, one at the least, that score highest: [B, H, I, K]."""
    found = scores(q_BHNC, k_BHMC, block)
    return found.topk(max(1, int(keep * found.shape[-1])), -1, sorted=False).indices


def place_major(grid: Grid, device: torch.device | None = None) -> Tensor:
    """The order [N] in which the frames of a place stand together."""
    return torch.arange(math.prod(grid), device=device).view(grid[0], -1).T.flatten()


def frames(grid: Grid, block: tuple[int, int], count: int, device: torch.device | None = None) -> Tensor:
    """Blocks [I, K] of the first frame and of the `count` - 1 nearest to a query's own, or of its own alone where
    `count` is 1, tokens in frame order: what a spatial head reads. Xi et al. 2025, arXiv:2502.01776 (Sparse VideoGen).
    Blocks must fill a frame."""
    size, count = grid[1] * grid[2], min(count, grid[0])
    own = torch.arange(grid[0], device=device)[:, None]
    near = (own - (count - 1) // 2).clamp(1, max(grid[0] - count + 1, 1)) + torch.arange(count - 1, device=device)
    read = own if count == 1 else torch.cat([torch.zeros_like(own), near], 1)
    within = torch.arange(size // block[1], device=device)
    blocks = (read[:, :, None] * (size // block[1]) + within).flatten(1)
    return blocks.repeat_interleave(size // block[0], 0)


def band(queries: int, keys: int, count: int, device: torch.device | None = None) -> Tensor:
    """Blocks [I, count] nearest to the diagonal."""
    middle = torch.arange(queries, device=device) * keys // queries
    return (middle - count // 2).clamp(0, keys - count)[:, None] + torch.arange(count, device=device)
