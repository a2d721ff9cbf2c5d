"""`block_attention` on a GPU: online softmax over the chosen blocks of keys, forward and backward.

Dao 2023, arXiv:2307.08691 alg. 1 and 2 with a list of blocks in the place of all: one program a block of queries
forward and for dq, one a block of keys for dk and dv; the output is divided once at the end and only the logarithm of
the sum of exponentials is kept for the way back. A tail of keys is more blocks, which every list ends with.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1 / math.log(2)
SMALLEST = 16
"""Side of the smallest product that tensor cores take."""


def block_attention_triton(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, index_BHIK: Tensor, block: tuple[int, int], tail: int = 0,
    bias_BM: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `hasten.kernels.block_sparse.block_attention`, of which B and H of the index are whole."""
    return _BlockAttention.apply(q_BHNC, k_BHMC, v_BHMC, index_BHIK, block, tail, bias_BM)[0]


def with_logsumexp(
    q_BHNC: Tensor, k_BHMC: Tensor, v_BHMC: Tensor, index_BHIK: Tensor, block: tuple[int, int], tail: int = 0,
    bias_BM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attention, and of each query the natural logarithm of its sum of exponentials, [B, H, N] float32."""
    out, lse = _BlockAttention.apply(q_BHNC, k_BHMC, v_BHMC, index_BHIK, block, tail, bias_BM)
    return out, lse / LOG2_E


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, index: Tensor, block: tuple[int, int], tail: int,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = (x.contiguous() for x in (q, k, v))
        batch, heads, queries, channels = q.shape
        keys = k.shape[2]
        blocks = -(-(keys - tail) // block[1])
        last = torch.arange(blocks, blocks - (-tail // block[1]), device=q.device, dtype=torch.int32)
        index = torch.cat([index.int(), last.expand(*index.shape[:3], -1)], -1).contiguous()
        bias = q if bias is None else bias.float().expand(batch, keys).contiguous()
        sizes = {
            "queries": queries, "keys": keys, "places": keys - tail, "blocks": blocks, "rows": index.shape[2],
            "kept": index.shape[3], "heads": heads, "scale": LOG2_E / math.sqrt(channels), "CHANNELS": channels,
            "ROWS": block[0], "COLUMNS": block[1], "R": _power(block[0]), "C": _power(block[1]),
            "D": _power(channels), "BIASED": bias is not q, "log2_e": LOG2_E,
        }  # fmt: skip
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
        _forward[(index.shape[2], batch * heads)](q, k, v, index, bias, out, lse, **sizes)
        ctx.save_for_backward(q, k, v, index, bias, out, lse)
        ctx.sizes, ctx.tail = sizes, len(last)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, index, bias, out, lse = ctx.saved_tensors
        batch, heads, rows, _ = index.shape
        dout = dout.contiguous()
        delta = (dout.float() * out.float()).sum(-1)
        total = ctx.sizes["blocks"] + ctx.tail
        chosen = torch.zeros(batch, heads, rows, total, dtype=torch.int8, device=q.device)
        chosen.scatter_(-1, index.long(), 1)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = (q, k, v, index, bias, dout, lse, delta)
        _backward_q[(rows, batch * heads)](*given, dq, **ctx.sizes)
        _backward_kv[(total, batch * heads)](*given, chosen, dk, dv, total=total, **ctx.sizes)
        return dq, dk, dv, None, None, None, None


def _power(size: int) -> int:
    return max(SMALLEST, triton.next_power_of_2(size))


@triton.jit
def _span(j, places, keys, blocks, COLUMNS: tl.constexpr):
    """First key of block j, and the end of the part that it lies in."""
    inside = j < blocks
    return tl.where(inside, j * COLUMNS, places + (j - blocks) * COLUMNS), tl.where(inside, places, keys)


@triton.jit
def _logits(q, k, key, ok, BIAS, b, keys, scale, log2_e, BIASED: tl.constexpr):
    """To the base 2, -inf where a block has no key."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if BIASED:
        s += tl.load(BIAS + b * keys + key, mask=ok, other=0.0)[None, :] * log2_e
    return tl.where(ok[None, :], s, float("-inf"))


@triton.jit
def _forward(
    Q, K, V, INDEX, BIAS, OUT, LSE, queries, keys, places, blocks, rows, kept, heads, scale, log2_e,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    i, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, c, d = tl.arange(0, R), tl.arange(0, C), tl.arange(0, D)
    row = i * ROWS + r
    at = bh * queries * CHANNELS + row[:, None] * CHANNELS + d[None, :]
    there = ((r < ROWS) & (row < queries))[:, None] & (d < CHANNELS)[None, :]
    q = tl.load(Q + at, mask=there, other=0.0)
    most = tl.full([R], float("-inf"), tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    for n in range(kept):
        j = tl.load(INDEX + (bh * rows + i) * kept + n)
        start, end = _span(j, places, keys, blocks, COLUMNS)
        key = start + c
        ok = (c < COLUMNS) & (key < end)
        of = bh * keys * CHANNELS + key[:, None] * CHANNELS + d[None, :]
        there_k = ok[:, None] & (d < CHANNELS)[None, :]
        k = tl.load(K + of, mask=there_k, other=0.0)
        s = _logits(q, k, key, ok, BIAS, bh // heads, keys, scale, log2_e, BIASED)
        new = tl.maximum(most, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(most - shift)
        v = tl.load(V + of, mask=there_k, other=0.0)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        most = new
    tl.store(OUT + at, (acc / total[:, None]).to(OUT.dtype.element_ty), mask=there)
    tl.store(LSE + bh * queries + row, most + tl.log2(total), mask=(r < ROWS) & (row < queries))


@triton.jit
def _backward_q(
    Q, K, V, INDEX, BIAS, DOUT, LSE, DELTA, DQ, queries, keys, places, blocks, rows, kept, heads, scale, log2_e,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    D: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    i, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, c, d = tl.arange(0, R), tl.arange(0, C), tl.arange(0, D)
    row = i * ROWS + r
    real = (r < ROWS) & (row < queries)
    at = bh * queries * CHANNELS + row[:, None] * CHANNELS + d[None, :]
    there = real[:, None] & (d < CHANNELS)[None, :]
    q, dout = tl.load(Q + at, mask=there, other=0.0), tl.load(DOUT + at, mask=there, other=0.0)
    lse = tl.load(LSE + bh * queries + row, mask=real, other=0.0)
    delta = tl.load(DELTA + bh * queries + row, mask=real, other=0.0)
    dq = tl.zeros([R, D], tl.float32)
    for n in range(kept):
        j = tl.load(INDEX + (bh * rows + i) * kept + n)
        start, end = _span(j, places, keys, blocks, COLUMNS)
        key = start + c
        ok = (c < COLUMNS) & (key < end)
        of = bh * keys * CHANNELS + key[:, None] * CHANNELS + d[None, :]
        there_k = ok[:, None] & (d < CHANNELS)[None, :]
        k, v = tl.load(K + of, mask=there_k, other=0.0), tl.load(V + of, mask=there_k, other=0.0)
        s = _logits(q, k, key, ok, BIAS, bh // heads, keys, scale, log2_e, BIASED)
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
    tl.store(DQ + at, (dq * (scale / log2_e)).to(DQ.dtype.element_ty), mask=there)


@triton.jit
def _backward_kv(
    Q, K, V, INDEX, BIAS, DOUT, LSE, DELTA, CHOSEN, DK, DV, queries, keys, places, blocks, rows, kept, heads, scale,
    log2_e, total, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    j, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    r, c, d = tl.arange(0, R), tl.arange(0, C), tl.arange(0, D)
    start, end = _span(j, places, keys, blocks, COLUMNS)
    key = start + c
    ok = (c < COLUMNS) & (key < end)
    of = bh * keys * CHANNELS + key[:, None] * CHANNELS + d[None, :]
    there_k = ok[:, None] & (d < CHANNELS)[None, :]
    k, v = tl.load(K + of, mask=there_k, other=0.0), tl.load(V + of, mask=there_k, other=0.0)
    dk, dv = tl.zeros([C, D], tl.float32), tl.zeros([C, D], tl.float32)
    for i in range(rows):
        if tl.load(CHOSEN + (bh * rows + i) * total + j) != 0:
            row = i * ROWS + r
            real = (r < ROWS) & (row < queries)
            at = bh * queries * CHANNELS + row[:, None] * CHANNELS + d[None, :]
            there = real[:, None] & (d < CHANNELS)[None, :]
            q, dout = tl.load(Q + at, mask=there, other=0.0), tl.load(DOUT + at, mask=there, other=0.0)
            lse = tl.load(LSE + bh * queries + row, mask=real, other=float("inf"))
            delta = tl.load(DELTA + bh * queries + row, mask=real, other=0.0)
            s = _logits(q, k, key, ok, BIAS, bh // heads, keys, scale, log2_e, BIASED)
            p = tl.exp2(s - lse[:, None])
            dv += tl.dot(tl.trans(p).to(dout.dtype), dout, input_precision="ieee")
            ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
            dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    tl.store(DK + of, (dk * (scale / log2_e)).to(DK.dtype.element_ty), mask=there_k)
    tl.store(DV + of, dv.to(DV.dtype.element_ty), mask=there_k)
