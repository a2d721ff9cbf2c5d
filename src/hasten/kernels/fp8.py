"""Attention in float8 as FlashAttention-3 has it: scales of blocks, and a rotation that spreads outliers first.

Letters of shapes: L tokens, N queries, M keys, C channels, T blocks of tokens. A product of an orthogonal matrix with
queries and keys leaves q k^T, and mixes every channel into every other, so that one large entry no longer takes the
range of its block. Shah et al. 2024, arXiv:2407.08608 section 3.3. Plain torch on any device: numbers, no speed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

systems = ("flashattention-3",)

MOST = 448.0  # of e4m3
PEAK = 256.0  # P is at most 1; a power of two moves it up the range of e4m3 without a rounding
LEAST = 1e-30


def e4m3(x: Tensor) -> Tensor:
    """Rounded to float8 e4m3, ties to even. Beyond 448 it is 448; what is not a number stays so."""
    return x.clamp(-MOST, MOST).to(torch.float8_e4m3fn)


def quantize_blocks(x: Tensor, block: int | None = 128) -> tuple[Tensor, Tensor]:
    """float8 of [..., L, C] with a scale for every `block` tokens, or one for each whole [L, C] where it is None.

    Returns:
        x8 [..., L, C] e4m3 and scale [..., L, 1] float32, so that scale * x8 is x to a rounding of 1/16 at most, or
        of scale / 1024 where x is small.
    """
    length, most = x.shape[-2], x.float().abs().amax(-1)
    block = length if block is None else block
    ranges = F.pad(most, (0, -length % block)).unflatten(-1, (-1, block)).amax(-1)
    scale = (ranges.clamp_min(LEAST) / MOST).repeat_interleave(block, -1)[..., :length, None]
    return e4m3(x.float() / scale), scale


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, in Sylvester's order, by log2(C) additions.

    Raises:
        ValueError: C is no power of two.

    >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0])).tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    channels = x.shape[-1]
    if channels < 1 or channels & (channels - 1):
        raise ValueError(f"a Hadamard transform takes a power of two of channels, not {channels}: pad with zeros")
    y, half = x, 1
    while half < channels:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y, half = torch.stack([a + b, a - b], -2).flatten(-3), 2 * half
    return y / math.sqrt(channels)


def signs(channels: int, generator: torch.Generator) -> Tensor:
    """[C] random signs, float32."""
    return torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1


def incoherent(x: Tensor, signs_C: Tensor) -> Tensor:
    """x times the orthogonal matrix diag(signs) Hadamard: with the same signs for queries and keys, q k^T stays."""
    return hadamard(x * signs_C.to(x))


def fp8_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, block: int | None = 128, signs_C: Tensor | None = None, peak: float | None = PEAK
) -> Tensor:
    """Attention of float8 q [..., N, C], k and v [..., M, C], at the scale 1 / sqrt(C), summed in float32.

    Args:
        block: tokens that share a scale, or None for one scale a tensor.
        signs_C: rotates queries and keys by `incoherent`; C is a power of two.
        peak: what P is multiplied by before its rounding to e4m3; None leaves it in float16, as in the paper's
            baseline of section 4.3.

    Returns:
        [..., N, C] float32.
    """
    if signs_C is not None:
        q, k = incoherent(q, signs_C), incoherent(k, signs_C)
    q, k, v = (x8.float() * scale for x8, scale in (quantize_blocks(x, block) for x in (q, k, v)))
    s = q @ k.mT / math.sqrt(q.shape[-1])
    p = torch.exp(s - s.amax(-1, keepdim=True))
    rounded = p.to(torch.float16).float() if peak is None else e4m3(p * peak).float() / peak
    return rounded @ v / p.sum(-1, keepdim=True)
