"""Tiles of an image: which are active, what a convolution reads for them, and where its output goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Window:
    """How a convolution moves over an image, in pixels, (down, across).

    Attributes:
        kernel: side of what one output pixel reads, gaps of a dilated kernel included.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @classmethod
    def of(cls, module: nn.Conv2d) -> Window | None:
        """That of a layer; None of one that pads with something else than zeros."""
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        k, d, s, p = module.kernel_size, module.dilation, module.stride, module.padding
        return cls((d[0] * (k[0] - 1) + 1, d[1] * (k[1] - 1) + 1), (s[0], s[1]), (int(p[0]), int(p[1])))

    def output(self, side: tuple[int, int]) -> tuple[int, int]:
        """Sides of the output for an image of these sides."""
        h, w = ((n + 2 * p - k) // s + 1 for n, p, k, s in zip(side, self.padding, self.kernel, self.stride))
        return h, w


@dataclass(frozen=True, slots=True)
class Tiles:
    """The active tiles of one convolution on one image.

    Attributes:
        rows, columns: [K, h] and [K, w], what each tile reads of the image, halo included; clamped to it.
        outside: [K, h, w], True where that lies in the padding.
        into: places in the flattened output of those of the K x tile x tile results that lie in it.
        taken: which those are, or None for all.
        side: of the output.
    """

    rows: Tensor
    columns: Tensor
    outside: Tensor
    into: Tensor
    taken: Tensor | None
    side: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rows)


def active(mask_HW: Tensor, window: Window, tile: int) -> Tiles:
    """The tiles, `tile` output pixels a side, that read a pixel of the mask (bool, over the input), their halo counted:
    every output that a changed pixel reaches is in one of them. Tiles start at the output's first pixel; at its end
    they may overhang. As in the code of Li et al. 2022, arXiv:2211.02048, whose blocks of 6 pixels under a 3 x 3
    convolution are tiles of 4.
    """
    side = window.output((mask_HW.shape[0], mask_HW.shape[1]))
    step = tuple(tile * s for s in window.stride)
    reach = tuple((tile - 1) * s + k for s, k in zip(window.stride, window.kernel))
    count = tuple(-(-n // tile) for n in side)
    pads = [
        v
        for n, c, st, r, p in zip(
            reversed(mask_HW.shape), reversed(count), reversed(step), reversed(reach), reversed(window.padding)
        )
        for v in (p, (c - 1) * st + r - n - p)
    ]
    seen = F.max_pool2d(F.pad(mask_HW.float()[None, None], pads), reach, step)[0, 0] > 0
    first = seen[: count[0], : count[1]].nonzero()
    device = mask_HW.device
    spans, cut = [], []
    for axis in (0, 1):
        at = first[:, axis, None] * step[axis] - window.padding[axis] + torch.arange(reach[axis], device=device)
        out = first[:, axis, None] * tile + torch.arange(tile, device=device)
        spans.append(at)
        cut.append(out)
    clamped = [at.clamp(0, n - 1) for at, n in zip(spans, mask_HW.shape)]
    off = [at != c for at, c in zip(spans, clamped)]
    inside = (cut[0] < side[0])[:, :, None] & (cut[1] < side[1])[:, None, :]
    into = (cut[0][:, :, None] * side[1] + cut[1][:, None, :]).flatten()
    taken = None if bool(inside.all()) else inside.flatten().nonzero()[:, 0]
    return Tiles(
        clamped[0], clamped[1], off[0][:, :, None] | off[1][:, None, :], into if taken is None else into[taken], taken,
        side,
    )  # fmt: skip


def gather(x_BCHW: Tensor, tiles: Tiles) -> Tensor:
    """[B K, C, h, w]: what each active tile reads, zeros in the padding."""
    read = x_BCHW[:, :, tiles.rows[:, :, None], tiles.columns[:, None, :]]  # [B, C, K, h, w]
    return read.masked_fill(tiles.outside, 0).transpose(1, 2).flatten(0, 1)


def scatter(results: Tensor, tiles: Tiles, base_BCHW: Tensor) -> Tensor:
    """A copy of `base` with the results [B K, C, tile, tile] of the active tiles in their places."""
    out = base_BCHW.flatten(2).clone(memory_format=torch.contiguous_format)
    new = results.unflatten(0, (len(base_BCHW), -1)).transpose(1, 2).flatten(2)
    out[:, :, tiles.into] = new if tiles.taken is None else new[:, :, tiles.taken]
    return out.unflatten(2, tiles.side)


def convolve(x: Tensor, layer: nn.Conv2d, tiles: Tiles, base: Tensor) -> Tensor:
    """The layer's output at active tiles, computed from x [B, C, H, W]; `base` elsewhere."""
    if not len(tiles):
        return base.clone()
    read = gather(x, tiles)
    return scatter(F.conv2d(read, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups), tiles, base)


def multiplies(layer: nn.Conv2d, pixels: int) -> int:
    """Multiply-adds of so many output pixels, rows of the batch included."""
    return pixels * layer.out_channels * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]


def grow(mask_HW: Tensor, by: int) -> Tensor:
    """Every pixel at most `by` rows and columns from one of the mask."""
    return F.max_pool2d(mask_HW.float()[None, None], 2 * by + 1, 1, by)[0, 0] > 0 if by else mask_HW


def resize(mask_HW: Tensor, side: tuple[int, int]) -> Tensor:
    """The mask at another resolution: a pixel is in it if any that it covers is. (The authors' code asks for a share of
    0.3, so that a small edit may vanish from the coarse ones.)"""
    return F.adaptive_max_pool2d(mask_HW.float()[None, None], side)[0, 0] > 0


def differs(x: Tensor, y: Tensor, more_than: float) -> Tensor:
    """[H, W] bool: where any row and channel of two [B, C, H, W] differ by more; NaN differs from everything."""
    return ~((x.float() - y.float()).abs() <= more_than).flatten(0, 1).all(0)
