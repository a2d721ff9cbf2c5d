"""Bipartite soft matching: which tokens are alike enough that one may stand for them, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Likeness = Literal["cosine", "euclidean"]

AT_ONCE = 2**24
"""Scores held in memory at a time."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """A shorter sequence of M tokens that stands for N: `unmerge(merge(x))` keeps what is alike, and doing both again
    changes nothing, to rounding.

    Attributes:
        stay_BM: which of the N tokens each of the M is; of those merged, the destination.
        back_BN: which of the M tokens stands for each of the N.
    """

    stay_BM: Tensor
    back_BN: Tensor

    def merge(self, x_BNC: Tensor) -> Tensor:
        """[B, M, C]: the mean of the tokens that each stands for. Bolya & Hoffman 2023, arXiv:2303.17604 sec. 3.1."""
        batch, _, width = x_BNC.shape
        short = self.stay_BM.shape[1]
        row = _flat(self.back_BN, short)
        wide = torch.promote_types(x_BNC.dtype, torch.float32)
        total = torch.zeros(batch * short, width, dtype=wide, device=x_BNC.device)
        total = total.index_add(0, row, x_BNC.reshape(-1, width).to(wide))
        count = total.new_zeros(batch * short).index_add(0, row, total.new_ones(len(row)))
        return (total / count[:, None]).to(x_BNC.dtype).view(batch, short, width)

    def pick(self, x_BNC: Tensor) -> Tensor:
        """[B, M, C]: the tokens that stay, as they are."""
        return take(x_BNC, self.stay_BM)

    def unmerge(self, y_BMC: Tensor) -> Tensor:
        """[B, N, C]: to each token what was computed for the one that stands for it."""
        return take(y_BMC, self.back_BN)


def take(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    """[B, K, C]: the rows of each sequence that its indices name."""
    batch, length, width = x_BNC.shape
    return x_BNC.reshape(-1, width).index_select(0, _flat(index_BK, length)).view(batch, -1, width)


def destinations(grid: Sequence[int], window: Sequence[int], rng: torch.Generator | None = None) -> Tensor:
    """Positions [D] of the tokens that others may be merged into: one of each window of a grid in row-major order.

    Args:
        grid: sides, such as (rows, columns) or (frames, rows, columns). What is left of a side that is no multiple of
            the window's holds none.
        window: sides of a window; one larger than the grid is cut to it.
        rng: draws the place within each window, in order; None takes the first of each. Random ones avoid the artefacts
            of a regular grid: arXiv:2303.17604 sec. 4.1; with frames: arXiv:2412.11706.

    Raises:
        ValueError: grid and window of other lengths, or a side below 1.
    """
    if len(grid) != len(window) or min(*grid, *window) < 1:
        raise ValueError(f"grid and window need as many sides, all of 1 or more; got {tuple(grid)} and {tuple(window)}")
    window = [min(w, g) for g, w in zip(grid, window, strict=True)]
    counts = [g // w for g, w in zip(grid, window, strict=True)]
    if rng is None:
        drawn = torch.zeros(counts, dtype=torch.int64)
    else:
        drawn = torch.randint(math.prod(window), counts, generator=rng, device=rng.device)
    position = torch.zeros_like(drawn)
    for d, offset in enumerate(torch.unravel_index(drawn, window)):
        shape = [-1 if e == d else 1 for e in range(len(counts))]
        start = torch.arange(counts[d], device=drawn.device).view(shape) * window[d]
        position = position * grid[d] + start + offset
    return position.flatten()


def match(metric_BNC: Tensor, into_D: Tensor, r: int, likeness: Likeness = "cosine") -> Pairs:
    """Merges the r tokens that are most like a destination into the destination that they are most like.

    Args:
        metric_BNC: what likeness is measured on.
        into_D: positions of the destinations, the same in every row; these always stay.
        r: tokens fewer; at most N - D go. 0 keeps all.
        likeness: the cosine of the angle between two, or less their squared distance.

    Source: Bolya & Hoffman 2023, arXiv:2303.17604 sec. 3.1 (and ToMe, arXiv:2210.09461); Euclidean in arXiv:2412.11706.
    Cost: 2 (N - D) D C flops a row.
    """
    batch, length, _ = metric_BNC.shape
    device = metric_BNC.device
    source = torch.ones(length, dtype=torch.bool)
    source[into_D.cpu()] = False
    from_S, into_D = source.nonzero()[:, 0].to(device), into_D.to(device)
    r = max(0, min(r, len(from_S)))
    with torch.no_grad():
        best_BS, which_BS = _nearest(metric_BNC[:, from_S], metric_BNC[:, into_D], likeness)
        order_BS = best_BS.argsort(dim=-1, descending=True, stable=True)
    go, keep = order_BS[:, :r], order_BS[:, r:]
    kept = keep.shape[1]
    stay_BM = torch.cat([from_S[keep], into_D.expand(batch, -1)], 1)
    back_BN = torch.empty(batch, length, dtype=torch.int64, device=device)
    back_BN.scatter_(1, stay_BM, torch.arange(stay_BM.shape[1], device=device).expand(batch, -1))
    back_BN.scatter_(1, from_S[go], kept + which_BS.gather(1, go))
    return Pairs(stay_BM, back_BN)


def redundancy(metric_BNC: Tensor, pairs: Pairs) -> Tensor:
    """How like the tokens that go are to those that stand for them: 1 - |a - b|^2 / (|a|^2 + |b|^2), mean over all;
    1 where they are equal, 0 where they are orthogonal."""
    a, b = metric_BNC, pairs.unmerge(pairs.pick(metric_BNC))
    gone = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device).scatter(1, pairs.stay_BM, value=False)
    size = (a.square().sum(-1) + b.square().sum(-1)).clamp_min(torch.finfo(a.dtype).tiny)
    return (1 - (a - b).square().sum(-1) / size)[gone].mean()


def _nearest(from_BSC: Tensor, into_BDC: Tensor, likeness: Likeness) -> tuple[Tensor, Tensor]:
    """The best score of each source, and with which destination."""
    batch, size = from_BSC.shape[:2]
    if likeness == "cosine":
        tiny = torch.finfo(from_BSC.dtype).tiny
        from_BSC, into_BDC = (x / x.norm(dim=-1, keepdim=True).clamp_min(tiny) for x in (from_BSC, into_BDC))
    else:  # a difference of squares, which half precision would lose
        wide = torch.promote_types(from_BSC.dtype, torch.float32)
        from_BSC, into_BDC = from_BSC.to(wide), into_BDC.to(wide)
    across_BCD = into_BDC.transpose(1, 2)
    square_B1D = into_BDC.square().sum(-1)[:, None]
    best, which = [], []
    for part in from_BSC.split(max(1, AT_ONCE // max(1, batch * into_BDC.shape[1])), 1):
        score = part @ across_BCD
        if likeness == "euclidean":  # up to the source's own square, which is the same for all destinations
            score = 2 * score - square_B1D
        top, at = score.max(-1)
        best.append(top if likeness == "cosine" else top - part.square().sum(-1))
        which.append(at)
    if size == 0:
        empty = from_BSC.new_zeros(batch, 0)
        return empty, empty.long()
    return torch.cat(best, 1), torch.cat(which, 1)


def _flat(index_BK: Tensor, length: int) -> Tensor:
    """Indices into the rows of all sequences, one after another."""
    first = torch.arange(len(index_BK), device=index_BK.device)[:, None] * length
    return (index_BK + first).flatten()
