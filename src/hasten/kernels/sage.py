"""Attention of 8- or 4-bit queries and keys: quantization, its reference in plain torch, and the one dispatch.

Letters of shapes: B batch, H heads, N queries, M keys, L either, C channels of a head, T blocks of 128 queries, G
groups of tokens that share a scale. With q = s_q q8 and k = s_k k8, symmetric, the logits are s_q s_k (q8 k8^T) /
sqrt(C): the sum is exact in int32, so the error is that of the roundings, and smoothing makes what is rounded small.

Zhang et al. 2024 (SageAttention), arXiv:2410.02367: keys less their mean, int8 of blocks, values in float16. Zhang et
al. 2024 (SageAttention2), arXiv:2411.10958: queries less their block's mean as well, a scale a thread, int4, values in
float8. Granularities are those of the authors' code (thu-ml/SageAttention, `quant_per_block`, `quant_per_thread`).
Their Triton kernel sums P V of one block of keys in float16 and adds that to float32; here all sums are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.kernels.fp8 import MOST, e4m3
from hasten.method import Refused

systems = ("sageattention", "sageattention-2")

Bits = Literal[8, 4]
Values = Literal["fp16", "fp8"]
Granularity = Literal["block", "thread"]

BLOCK_Q, BLOCK_K = 128, 64
MOST_INT = {8: 127, 4: 7}
LEAST = 1e-30  # a group of zeros gets this range instead of a division by zero
WIDEST = 128
THRESHOLD = 0.998


@dataclass(frozen=True)
class Groups:
    """Which tokens share a scale: of every `tile` in a row, those that fall in the same `width` of each run of 8.

    A width of 8 is a scale for the tile. In an int8 product of tensor cores a thread holds, of every 8 rows, one, and
    of every 8 columns, two neighbours: with widths 1 and 2 it needs one scale of each.
    """

    tile: int
    width: int

    def count(self, tokens: int) -> int:
        """Groups in so many tokens, the last tile full or not."""
        return -(-tokens // self.tile) * (8 // self.width)

    def of(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """[tokens] the group of each."""
        i = torch.arange(tokens, device=device)
        return i // self.tile * (8 // self.width) + i % 8 // self.width


QUERIES = {"block": Groups(BLOCK_Q, 8), "thread": Groups(32, 1)}
KEYS = {"block": Groups(BLOCK_K, 8), "thread": Groups(BLOCK_K, 2)}


@dataclass(frozen=True)
class Setting:
    """What numbers an attention is computed in. The default is SageAttention.

    Attributes:
        bits: of queries and keys. 4 is for study: Triton reaches no 4-bit tensor cores, so these ride in int8 products
            and take as long.
        values: of P and V. "fp8" is e4m3 with a scale for each channel of V, and 448 for P, which is at most 1.
        smooth_q, smooth_k, smooth_v: what has its mean taken off; the result is the same but for rounding.
        granularity: a scale for each block of 128 queries or 64 keys, or for those that a thread holds.
    """

    bits: Bits = 8
    values: Values = "fp16"
    smooth_q: bool = False
    smooth_k: bool = True
    smooth_v: bool = False
    granularity: Granularity = "block"

    def __post_init__(self) -> None:
        for name, known in (("bits", (8, 4)), ("values", ("fp16", "fp8")), ("granularity", ("block", "thread"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not known: {known[0]!r} or {known[1]!r}")


SAGE = Setting()
SAGE_2 = Setting(values="fp8", granularity="thread")
SAGE_2_INT4 = Setting(bits=4, values="fp8", smooth_q=True, granularity="thread")
LADDER = (SAGE_2, SAGE)


def smooth_k(k: Tensor) -> Tensor:
    """Keys [B, H, M, C] less their mean over tokens, in float32 or wider. Every row of logits moves by one number, so
    the softmax stays. SageAttention, the section on smoothing K."""
    return _wide(k) - key_mean(k)


def key_mean(x: Tensor) -> Tensor:
    """[B, H, 1, C] the mean over tokens, of keys or of values."""
    return x.mean(2, keepdim=True, dtype=_wide_type(x))


def query_means(q: Tensor) -> Tensor:
    """[B, H, T, C] the means of blocks of 128 queries; of the last, of those that it has."""
    length, blocks = q.shape[2], -(-q.shape[2] // BLOCK_Q)
    sums = F.pad(_wide(q), (0, 0, 0, blocks * BLOCK_Q - length)).unflatten(2, (blocks, BLOCK_Q)).sum(3)
    sizes = torch.full((blocks, 1), float(BLOCK_Q), dtype=sums.dtype, device=q.device)
    sizes[-1] = length - (blocks - 1) * BLOCK_Q
    return sums / sizes


def smooth_queries(q: Tensor) -> Tensor:
    """Queries [B, H, N, C] less the mean of their block, in float32 or wider. `correction` is what that takes off the
    logits."""
    return _wide(q) - query_means(q).repeat_interleave(BLOCK_Q, 2)[:, :, : q.shape[2]]


def correction(means: Tensor, k: Tensor) -> Tensor:
    """[B, H, T, M] what a block's mean adds to its rows of q k^T, the Delta S of SageAttention2; not divided by
    sqrt(C). In float32 it takes 4 bytes for every key and 128 queries."""
    return means @ _wide(k).mT


def quantize(x: Tensor, groups: Groups, bits: Bits = 8) -> tuple[Tensor, Tensor]:
    """Symmetric integers of [B, H, L, C], with a scale for each group of tokens; ties go away from zero.

    Returns:
        q [B, H, L, C] int8 in [-127, 127], or [-7, 7], and scale [B, H, G] float32, with |scale q - x| <= scale / 2 to
        the rounding of float32. The scale of what is not finite is not finite either.

    >>> q, scale = quantize(torch.tensor([[[[0.5, -2.0, 1.0]]]]), Groups(64, 8))
    >>> q.tolist(), round(scale.item(), 4)
    ([[[[32, -127, 64]]]], 0.0157)
    """
    x = x.float()
    index, most = groups.of(x.shape[2], x.device), x.abs().amax(-1)
    ranges = most.new_zeros(*most.shape[:2], groups.count(x.shape[2]))
    ranges = ranges.scatter_reduce(2, index.expand_as(most), most, "amax")
    # by a tensor: CUDA divides by a number through its reciprocal, and then the kernel's integers are others
    scale = ranges.clamp_min(LEAST) / torch.full_like(ranges, MOST_INT[bits])
    steps = x / scale[:, :, index, None]
    return (steps + torch.where(steps >= 0, 0.5, -0.5)).to(torch.int8), scale


def narrow(v: Tensor, values: Values = "fp16") -> tuple[Tensor, Tensor | None]:
    """Values [B, H, M, C] in float16, or in e4m3 with a scale [B, H, 1, C] float32 for each channel. float16 holds
    values up to 65504."""
    if values == "fp16":
        return v.to(torch.float16), None
    scale = v.float().abs().amax(2, keepdim=True).clamp_min(LEAST) / MOST
    return e4m3(v.float() / scale), scale


def sage_reference(
    q: Tensor, k: Tensor, v: Tensor, bits: Bits = 8, values: Values = "fp16", smooth_q: bool = False, *,
    smooth_k: bool = True, smooth_v: bool = False, granularity: Granularity = "block",
) -> Tensor:  # fmt: skip
    """What `sage_attention` must equal before its last rounding, on any device: the same integers, the same blocks of
    keys one after another, P rounded as there. Settings are those of `Setting`.

    Returns:
        [B, H, N, C] float32.
    """
    setting = Setting(bits, values, smooth_q, smooth_k, smooth_v, granularity)
    check(q, k, v)
    shared = Shared.of(q, k, v, setting)
    queries, keys = QUERIES[granularity], KEYS[granularity]
    q8, q_scale = quantize(smooth_queries(q) if smooth_q else q, queries, bits)
    k8, k_scale = quantize(k if shared.k_mean is None else _wide(k) - shared.k_mean, keys, bits)
    q_scale = (q_scale * logits_in_bits(q))[:, :, queries.of(q.shape[2], q.device), None]
    k_scale = k_scale[:, :, None, keys.of(k.shape[2], k.device)]
    peak = 1.0 if values == "fp16" else MOST
    o = q.new_zeros(q.shape, dtype=torch.float32)
    l, m = torch.zeros_like(o[..., :1]), torch.full_like(o[..., :1], -math.inf)  # noqa: E741
    for at in range(0, k.shape[2], BLOCK_K):
        some = slice(at, at + BLOCK_K)
        # whole numbers below 2^24, so float32 sums them as int32 does
        s = q8.float() @ k8[:, :, some].float().mT * q_scale * k_scale[..., some]
        if shared.delta is not None:
            s = s + shared.delta[..., some].repeat_interleave(BLOCK_Q, 2)[:, :, : q.shape[2]]
        top = torch.maximum(m, s.amax(-1, keepdim=True))
        p, shrink = torch.exp2(s - top), torch.exp2(m - top)
        l, m = l * shrink + p.sum(-1, keepdim=True), top  # noqa: E741
        p = p.to(torch.float16) if values == "fp16" else e4m3(p * MOST)
        o = o * shrink + p.float() @ shared.v[:, :, some].float()
    o = o / (l * peak)
    o = o if shared.v_scale is None else o * shared.v_scale
    return o if shared.v_mean is None else o + shared.v_mean


@dataclass(frozen=True)
class Shared:
    """What kernel and reference take alike: means, in float32, the correction in powers of two, and the values."""

    q_means: Tensor | None
    k_mean: Tensor | None
    v_mean: Tensor | None
    delta: Tensor | None
    v: Tensor
    v_scale: Tensor | None

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, setting: Setting) -> Shared:
        """From queries, keys and values."""
        k_mean = key_mean(k).float() if setting.smooth_k else None
        v_mean = key_mean(v).float() if setting.smooth_v else None
        q_means = query_means(q).float() if setting.smooth_q else None
        delta = None
        if q_means is not None:
            smooth = k.float() if k_mean is None else k.float() - k_mean
            delta = correction(q_means, smooth) * logits_in_bits(q)
        narrowed, v_scale = narrow(v if v_mean is None else v.float() - v_mean, setting.values)
        return cls(q_means, k_mean, v_mean, delta, narrowed, v_scale)


def logits_in_bits(q: Tensor) -> float:
    """log2(e) / sqrt(C): the softmax is taken in powers of two."""
    return math.log2(math.e) / math.sqrt(q.shape[-1])


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q is [B, H, N, C] and k and v are [B, H, M, C], with a token at least."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fits or 0 in (*q.shape, *k.shape):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention takes q [B, H, N, C], k and v [B, H, M, C], none of them empty, not {shapes}")


def backend(device: torch.device, values: Values = "fp16") -> Literal["triton"]:
    """Which kernels a device has.

    Raises:
        Refused: none; nothing is simulated.
    """
    leave = "leave it out, or use exact attention there"
    if device.type != "cuda" or not torch.version.cuda:
        raise Refused(f"low-bit attention runs on NVIDIA GPUs, not on {device.type!r}: {leave}")
    if find_spec("triton") is None:
        raise Refused("low-bit attention needs Triton, which is not installed: pip install triton")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise Refused(f"low-bit attention needs compute capability 8.0 (Ampere) or newer: {leave}")
    if values == "fp8" and capability < (8, 9):
        raise Refused("float8 values need compute capability 8.9 (Ada) or newer: set values to 'fp16'")
    return "triton"


def sage_attention(
    q: Tensor, k: Tensor, v: Tensor, bits: Bits = 8, values: Values = "fp16", smooth_q: bool = False, *,
    smooth_k: bool = True, smooth_v: bool = False, granularity: Granularity = "block", mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(C)) v from low-bit q and k: [B, H, N, C], contiguous, in the precision of `q`. Settings are
    those of `Setting`.

    Raises:
        Refused: no kernel on this device, a mask, a gradient, or more than 128 channels a head.
        ValueError: shapes or settings that do not fit.
    """
    setting = Setting(bits, values, smooth_q, smooth_k, smooth_v, granularity)
    check(q, k, v)
    if mask is not None:
        raise Refused("low-bit attention takes no mask: use exact attention for layers that have one")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise Refused("low-bit attention has no gradient: run under torch.no_grad(), or remove it before training")
    if q.shape[-1] > WIDEST:
        raise Refused(f"low-bit attention takes heads of {WIDEST} channels at most, not {q.shape[-1]}: leave it out")
    backend(q.device, values)
    from hasten.kernels import sage_triton  # Triton is loaded where it is used

    return sage_triton.attention(q, k, v, setting)


def cosine(out: Tensor, want: Tensor) -> float:
    """The cosine of two outputs as vectors, by which SageAttention chooses a kernel for each layer."""
    a, b = out.double().flatten(), want.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def passing(
    q: Tensor, k: Tensor, v: Tensor, threshold: float = THRESHOLD, settings: Sequence[Setting] = LADDER
) -> Setting | None:
    """The first of `settings`, the fastest first, whose output has at least this cosine with exact attention; None
    where none has, so that the layer stays exact. 99.8 % is SageAttention's, the section on adaptive quantization.
    Computed by `sage_reference`, on any device."""
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return next((s for s in settings if cosine(sage_reference(q, k, v, **asdict(s)), want) >= threshold), None)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_type(x))


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
