"""The Triton kernels of `sage`: one that smooths and quantizes, one that attends over blocks of keys.

Shapes as there, with Z = B H, and D channels: C filled up with zeros to a power of two, 32 at least. Loaded by `sage`
alone, and only to run. Block sizes are SageAttention's, so nothing is tuned at run time.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from hasten.kernels.fp8 import MOST
from hasten.kernels.sage import BLOCK_K, BLOCK_Q, KEYS, LEAST, MOST_INT, QUERIES, Groups, Setting, Shared
from hasten.kernels.sage import logits_in_bits as in_bits

NO_MEAN = 1 << 30


@triton.jit
def quantize_kernel(
    x_ptr: tl.tensor, mean_ptr: tl.tensor, q_ptr: tl.tensor, scale_ptr: tl.tensor,
    H: tl.tensor, L: tl.tensor, C: tl.tensor, groups: tl.tensor,
    x_b: tl.tensor, x_h: tl.tensor, x_l: tl.tensor, x_c: tl.tensor,
    mean_rows: tl.tensor, mean_count: tl.tensor, least: tl.tensor, most: tl.tensor,
    SMOOTH: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """One group of one head: the mean off, the scale found, the integers written."""
    group, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile, of_run = group // (8 // WIDTH), group % (8 // WIDTH)
    j, c = tl.arange(0, TILE * WIDTH // 8), tl.arange(0, D)
    row = tile * TILE + j // WIDTH * 8 + of_run * WIDTH + j % WIDTH
    inside = (row < L)[:, None] & (c < C)[None, :]
    x_at = x_ptr + z // H * x_b + z % H * x_h + row.to(tl.int64)[:, None] * x_l + c[None, :] * x_c
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        mean = tl.load(mean_ptr + (z * mean_count + tile * TILE // mean_rows) * C + c, mask=c < C, other=0.0)
        x = tl.where(inside, x - mean[None, :], 0.0)
    # division as IEEE has it, for the integers of the reference; a maximum passes over what is no number
    scale = tl.div_rn(tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), least), most)
    scale = tl.where(tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0, float("nan"), scale)
    steps = tl.div_rn(x, tl.zeros_like(x) + scale)
    q = (steps + tl.where(steps >= 0, 0.5, -0.5)).to(tl.int8)
    tl.store(q_ptr + (z * L + row)[:, None] * D + c[None, :], q, mask=(row < L)[:, None])
    tl.store(scale_ptr + z * groups + group, scale)


@triton.jit
def attention_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, q_scale_ptr: tl.tensor, k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor, v_mean_ptr: tl.tensor, delta_ptr: tl.tensor, out_ptr: tl.tensor,
    N: tl.tensor, M: tl.tensor, C: tl.tensor, q_groups: tl.tensor, k_groups: tl.tensor, in_bits: tl.tensor,
    v_z: tl.tensor, v_m: tl.tensor, v_c: tl.tensor,
    FP8: tl.constexpr, DELTA: tl.constexpr, V_MEAN: tl.constexpr, TILE_Q: tl.constexpr, WIDTH_Q: tl.constexpr,
    TILE_K: tl.constexpr, WIDTH_K: tl.constexpr, ROWS: tl.constexpr, KEYS_AT_ONCE: tl.constexpr, D: tl.constexpr,
    PEAK: tl.constexpr,
) -> None:  # fmt: skip
    """One block of queries of one head, over all keys: online softmax in powers of two."""
    block, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, j, c = block * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS_AT_ONCE), tl.arange(0, D)
    q = tl.load(q_ptr + (z * N + i)[:, None] * D + c[None, :], mask=(i < N)[:, None], other=0)
    q_group = i // TILE_Q * (8 // WIDTH_Q) + i % 8 // WIDTH_Q
    q_scale = tl.load(q_scale_ptr + z * q_groups + q_group, mask=i < N, other=0.0) * in_bits
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)  # noqa: E741
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, M, KEYS_AT_ONCE):
        key = start + j
        k = tl.load(k_ptr + (z * M + key)[None, :] * D + c[:, None], mask=(key < M)[None, :], other=0)
        k_group = key // TILE_K * (8 // WIDTH_K) + key % 8 // WIDTH_K
        k_scale = tl.load(k_scale_ptr + z * k_groups + k_group, mask=key < M, other=0.0)
        s = tl.dot(q, k).to(tl.float32) * q_scale[:, None] * k_scale[None, :]
        if DELTA:
            s += tl.load(delta_ptr + (z * tl.cdiv(N, ROWS) + block) * M + key, mask=key < M, other=0.0)[None, :]
        s = tl.where((key < M)[None, :], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p, shrink = tl.exp2(s - top[:, None]), tl.exp2(m - top)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        m = top
        v_at = v_ptr + z * v_z + key.to(tl.int64)[:, None] * v_m + c[None, :] * v_c
        v = tl.load(v_at, mask=(key < M)[:, None] & (c < C)[None, :], other=0.0)
        if FP8:
            # tensor cores sum float8 in 13 bits or so: no more than these keys, the rest in float32
            pv = tl.dot((p * PEAK).to(tl.float8e4nv), v, max_num_imprecise_acc=KEYS_AT_ONCE)
        else:
            pv = tl.dot(p.to(tl.float16), v)
        acc = acc * shrink[:, None] + pv
    if FP8:
        v_scale = tl.load(v_scale_ptr + z * C + c, mask=c < C, other=0.0)
        acc = acc / (l * PEAK)[:, None] * v_scale[None, :]
    else:
        acc = acc / l[:, None]
    if V_MEAN:
        acc += tl.load(v_mean_ptr + z * C + c, mask=c < C, other=0.0)[None, :]
    out = out_ptr + (z * N + i)[:, None] * C + c[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(i < N)[:, None] & (c < C)[None, :])


def filled(channels: int) -> int:
    """The power of two, 32 at least, that channels are filled up to."""
    return max(32, 1 << (channels - 1).bit_length())


def quantize(x: Tensor, means: Tensor | None, groups: Groups, bits: int) -> tuple[Tensor, Tensor]:
    """`sage.quantize` of x [B, H, L, C] less the means [B, H, 1 or T, C] of all tokens or of blocks of 128.

    Returns:
        q [B, H, L, D] int8, zeros beyond C, and scale [B, H, G] float32.
    """
    b, h, length, channels = x.shape
    d, count = filled(channels), groups.count(length)
    q = torch.empty(b, h, length, d, dtype=torch.int8, device=x.device)
    scale = torch.empty(b, h, count, dtype=torch.float32, device=x.device)
    blocks = 1 if means is None else means.shape[2]
    quantize_kernel[(count, b * h)](
        x, x if means is None else means.contiguous(), q, scale, h, length, channels, count,
        *x.stride(), NO_MEAN if blocks == 1 else BLOCK_Q, blocks, LEAST, float(MOST_INT[bits]),
        SMOOTH=means is not None, TILE=groups.tile, WIDTH=groups.width, D=d, num_warps=4,
    )  # fmt: skip
    return q, scale


def attention(q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Tensor:
    """softmax(q k^T / sqrt(C)) v: [B, H, N, C], contiguous, in the precision of `q`. What is refused is refused by
    `sage.sage_attention`."""
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        shared = Shared.of(q, k, v, setting)
        queries, keys = QUERIES[setting.granularity], KEYS[setting.granularity]
        q8, q_scale = quantize(q, shared.q_means, queries, setting.bits)
        k8, k_scale = quantize(k, shared.k_mean, keys, setting.bits)
        values = shared.v.flatten(0, 1)
        if setting.values == "fp8":
            values = keys_innermost(values)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        (b, h, n, channels), m, d = q.shape, k.shape[2], q8.shape[3]
        of_channels = [out if x is None else x.contiguous() for x in (shared.v_scale, shared.v_mean)]
        warps, stages = launch(d)
        attention_kernel[(triton.cdiv(n, BLOCK_Q), b * h)](
            q8, k8, values, q_scale, k_scale, *of_channels,
            out if shared.delta is None else shared.delta, out, n, m, channels, q_scale.shape[2], k_scale.shape[2],
            in_bits(q), *values.stride(), FP8=setting.values == "fp8", DELTA=shared.delta is not None,
            V_MEAN=shared.v_mean is not None, TILE_Q=queries.tile, WIDTH_Q=queries.width, TILE_K=keys.tile,
            WIDTH_K=keys.width, ROWS=BLOCK_Q, KEYS_AT_ONCE=BLOCK_K, D=d, PEAK=MOST, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def launch(d: int) -> tuple[int, int]:
    """(warps, stages), as the authors' code has them for 64 and 128 channels."""
    return (4, 3) if d <= 64 else (8, 4)


def keys_innermost(v: Tensor) -> Tensor:
    """[Z, M, C] with neighbouring keys side by side in memory, as Hopper's float8 products read them, and every channel
    at a multiple of 16 bytes."""
    z, m, channels = v.shape
    room = torch.empty(z, channels, -(-m // 16) * 16, dtype=v.dtype, device=v.device)[..., :m]
    return room.copy_(v.mT).mT
