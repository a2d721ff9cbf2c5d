"""Exact attention in tiles, in plain operators.

Letters of shapes: B batch, H heads, N queries, M keys, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

TILE = 128


def tiled_attention(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, mask: Tensor | None = None, tile: int = TILE
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(C) + mask) v, [B, H, N, C], and the logarithms of sums of exponentials [B, H, N], in O(N)
    memory: keys pass tile by tile under a running maximum and sum, and the way back forms each tile again. Dao et al.
    2022, arXiv:2205.14135 alg. 1 and 4; divided once at the end, as Dao 2023, arXiv:2307.08691 alg. 1.

    The reference that kernels are read against, and what runs where a backend has no kernel. A query that sees no key
    gives zero.

    Args:
        mask: [B or 1, H or 1, N or 1, M], bool (True is seen) or added to the logits; it has no gradient.
    """
    return _Tiled.apply(q_BHNC, k_BHMC, v_BHMC, None if mask is None else added(mask, _wide(q_BHNC)), tile)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
        most = q.new_full(q.shape[:3], -torch.inf, dtype=_wide(q))
        total, acc = torch.zeros_like(most), torch.zeros(*q.shape[:3], v.shape[3], dtype=_wide(q), device=q.device)
        for at in _tiles(k, tile):
            s = _logits(q, k, bias, at)
            new = torch.maximum(most, s.amax(-1))
            shift = new.masked_fill(new == -torch.inf, 0)
            p, fade = (s - shift[..., None]).exp(), (most - shift).exp()
            acc = acc * fade[..., None] + p @ v[:, :, at].to(p.dtype)
            total, most = total * fade + p.sum(-1), new
        out = (acc / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]).to(q.dtype)
        lse = most + total.log()
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.tile = tile
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        scale, dout = 1 / math.sqrt(q.shape[-1]), dout.to(lse.dtype)
        delta = (dout * out.to(lse.dtype)).sum(-1, keepdim=True)
        shift = lse.masked_fill(lse == -torch.inf, 0)[..., None]
        dq, dk, dv = torch.zeros_like(q, dtype=lse.dtype), torch.empty_like(k), torch.empty_like(v)
        for at in _tiles(k, ctx.tile):
            p = (_logits(q, k, bias, at) - shift).exp()
            dv[:, :, at] = (p.transpose(2, 3) @ dout).to(v.dtype)
            ds = p * (dout @ v[:, :, at].to(p.dtype).transpose(2, 3) - delta) * scale
            dq += ds @ k[:, :, at].to(p.dtype)
            dk[:, :, at] = (ds.transpose(2, 3) @ q.to(p.dtype)).to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(k: Tensor, tile: int) -> list[slice]:
    return [slice(i, i + tile) for i in range(0, k.shape[2], tile)]


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, at: slice) -> Tensor:
    s = q.to(_wide(q)) @ k[:, :, at].to(_wide(q)).transpose(2, 3) / math.sqrt(q.shape[-1])
    return s if bias is None else s + bias[..., at]


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to the logits: of bool, True is seen."""
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
