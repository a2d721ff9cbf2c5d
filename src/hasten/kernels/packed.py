"""Codes of 4, 2 and 1 bits, so many to a byte.

Letters of shapes: I numbers of a row, B bytes of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.format import INTEGERS, Codes, Format

WIDTHS = (1, 2, 4)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes below 2^bits, [..., I] -> uint8 [..., B], B = ceil(I bits / 8); the first in the lowest bits.

    Raises:
        ValueError: bits that do not divide a byte evenly, or a code that does not fit.

    >>> pack_bits(torch.tensor([1, 2, 15]), 4).tolist()
    [33, 15]
    """
    if bits not in WIDTHS:
        raise ValueError(f"codes of {bits} bits do not fill bytes evenly: 1, 2 or 4")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise ValueError(
            f"codes of {bits} bits lie in [0, {2**bits - 1}], not [{int(codes.min())}, {int(codes.max())}]"
        )
    each = 8 // bits
    parts = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % each)).to(torch.uint8).unflatten(-1, (-1, each))
    out = parts[..., 0]
    for i in range(1, each):
        out = out | (parts[..., i] << (bits * i))
    return out


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """`pack_bits` undone: uint8 [..., count]."""
    each, mask = 8 // bits, 2**bits - 1
    parts = torch.stack([(packed >> (bits * i)) & mask for i in range(each)], -1)
    return parts.flatten(-2)[..., :count]


def stored(q: Codes) -> Tensor:
    """The codes in as few bytes as they need: packed where bits divide a byte, else a byte each."""
    bits = q.format.bits
    return pack_bits(_unsigned(q.codes, q.format), bits) if bits in WIDTHS else q.codes


def restored(stored: Tensor, format: Format, count: int) -> Tensor:
    """The codes of rows of `count` again, from what `stored` made of them."""
    bits = format.bits
    return _signed(unpack_bits(stored, bits, count), format) if bits in WIDTHS else stored


def _unsigned(codes: Tensor, format: Format) -> Tensor:
    if format.element == "binary":
        return (codes > 0).to(torch.uint8)
    return codes.to(torch.int16) + int(format.most) if _has_sign(format) else codes


def _signed(low: Tensor, format: Format) -> Tensor:
    if format.element == "binary":
        return (2 * low.to(torch.int8) - 1).to(torch.int8)
    return (low.to(torch.int16) - int(format.most)).to(torch.int8) if _has_sign(format) else low


def _has_sign(format: Format) -> bool:
    return format.element in INTEGERS and format.symmetric
