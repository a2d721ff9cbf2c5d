"""How numbers are stored in few bits: an element type, and who shares a scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Element = Literal["int8", "int6", "int4", "int3", "int2", "binary", "e4m3", "e5m2", "e2m1"]
Scales = Literal["float32", "e8m0", "e4m3", "whole"]
Share = Literal["tensor", "row"] | int

INTEGERS = {"int8": 8, "int6": 6, "int4": 4, "int3": 3, "int2": 2}
FLOATS = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
"""The largest number of each."""

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TWO_ONE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What e2m1 can say, besides the sign (OCP Microscaling Formats 1.0, table 5)."""

LEAST = 1e-30
"""A group of zeros gets this range instead of a division by zero."""


@dataclass(frozen=True)
class Format:
    """A way to store numbers [..., I].

    Attributes:
        element: integers of 2 to 8 bits, the sign alone, or small floats: e4m3 and e5m2 of 8 bits, e2m1 of 4.
        share: who shares a scale: the whole tensor, each row of I (a weight's output channel, an activation's token),
            or so many neighbours of a row.
        symmetric: integers from -n to n, so that zero is code 0; else from 0 up, with a zero point.
        scales: how scales are stored: as they are, as powers of two (MX formats), in e4m3 under one float32 of the
            whole tensor (NVFP4), or as whole multiples of one float32 of the row, so that code times multiple is
            again an 8-bit integer, and sums over the row stay whole (Lin et al. 2024, QServe, arXiv:2405.04532
            sec. 4.1, there with a zero point).

    Raises:
        ValueError: floats or signs without symmetry, a group of no one, or whole multiples of what is no symmetric
            integer of less than 8 bits.
    """

    element: Element = "int8"
    share: Share = "row"
    symmetric: bool = True
    scales: Scales = "float32"

    def __post_init__(self) -> None:
        if not self.symmetric and self.element not in INTEGERS:
            raise ValueError(f"{self.element} is symmetric: a zero point is for integers")
        if self.scales == "whole" and not (self.symmetric and self.element in INTEGERS and self.bits < 8):
            raise ValueError(f"whole multiples are for symmetric integers below 8 bits, not {self.element}")
        if not isinstance(self.share, str) and self.share < 1:
            raise ValueError(f"a group has one number or more, not {self.share}")

    @property
    def bits(self) -> int:
        """Of one number, without its share of the scale."""
        return INTEGERS.get(self.element) or {"binary": 1, "e2m1": 4}.get(self.element, 8)

    @property
    def most(self) -> float:
        """The largest code; 1 for signs."""
        if self.element in INTEGERS:
            return float(2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1)
        return FLOATS.get(self.element, 1.0)

    def sharing(self, share: Share) -> Format:
        """The same with other sharers."""
        return replace(self, share=share)


INT8, INT4, INT2 = Format(), Format("int4", 64), Format("int2", 64)
BINARY, FP8 = Format("binary"), Format("e4m3")
MXFP4, NVFP4 = Format("e2m1", 32, scales="e8m0"), Format("e2m1", 16, scales="e4m3")
MXFP8 = Format("e4m3", 32, scales="e8m0")
INT4_IN_INT8 = Format("int4", 64, scales="whole")
"""Weights that 8-bit arithmetic multiplies: see `in_int8`."""


@dataclass(frozen=True)
class Codes:
    """Numbers in a format.

    Attributes:
        codes: [..., I]: int8 (symmetric, signs), uint8 (from 0 up; indices of e2m1, sign first), or torch's float8.
        scale: float32, [..., G, 1] for G groups of a row; [1, 1] for the tensor.
        zero: the code of zero, like `scale`, where the format has one.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


def quantize(x: Tensor, format: Format) -> Codes:
    """The nearest codes at the scales that `scales` finds.

    Of symmetric integers |scale q - x| <= scale / 2, of others <= scale (the zero point is an integer, too); of floats
    of m mantissa bits <= max(|x| 2^-(m + 1), scale * half the least step), where powers of two as scales let the
    largest numbers saturate: there at most a quarter more.

    Args:
        x: [..., I] of any precision.

    Raises:
        ValueError: x is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{int((~torch.isfinite(x)).sum())} of {x.numel()} numbers are not finite: nothing codes them")
    return encode(x, format, *scales(x, format))


def scales(x: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) of every group so that its largest number is the largest code, as in `Codes`. Signs have the scale
    of least square error, the mean of |x| (Rastegari et al. 2016, arXiv:1603.05279 eq. 6)."""
    g = grouped(x.double(), format.share)
    if not format.symmetric:
        low, high = g.amin(-1, True).clamp_max(0), g.amax(-1, True).clamp_min(0)
        scale = _stored((high - low).clamp_min(LEAST) / format.most, format)
        return scale.float(), torch.round(-low / scale).float()
    if format.element == "binary":
        return g.abs().mean(-1, True).float(), None
    reach = g.abs().amax(-1, True).clamp_min(LEAST)
    return (_power(reach, format) if format.scales == "e8m0" else _stored(reach / format.most, format)).float(), None


def encode(x: Tensor, format: Format, scale: Tensor, zero: Tensor | None = None) -> Codes:
    """The nearest codes at these scales, ties to even; beyond the largest code it is the largest."""
    g = grouped(x.double(), format.share)
    if zero is not None:
        codes = (torch.round(g / scale.double()) + zero).clamp(0, format.most)
        return Codes(format, _flat(codes, x).to(torch.uint8), scale, zero)
    if format.element == "binary":
        return Codes(format, _flat(torch.where(g < 0, -1.0, 1.0), x).to(torch.int8), scale)
    codes = (g / scale.double()).clamp(-format.most, format.most)
    return Codes(format, _coded(_flat(codes, x), format), scale)


def dequantize(q: Codes) -> Tensor:
    """float32 [..., I]."""
    values = q.codes.float()
    if q.format.element == "e2m1":
        table = torch.tensor([*TWO_ONE, *(-v for v in TWO_ONE)], device=q.codes.device)
        values = table[q.codes.int()]
    g = grouped(values, q.format.share)
    return _flat((g if q.zero is None else g - q.zero) * q.scale, values)


def multiples(format: Format) -> int:
    """The largest whole multiple of a row's unit, so that it times the largest code is an 8-bit integer."""
    return int(127 // format.most)


def in_int8(q: Codes) -> tuple[Tensor, Tensor]:
    """Codes of whole multiples as 8-bit integers: int8 [..., I] and the unit of each row, float32 [..., 1], whose
    product is `dequantize(q)`."""
    unit = q.scale.amax(-2) / multiples(q.format)
    times = torch.round(q.scale / unit.unsqueeze(-1))
    return _flat(grouped(q.codes.float(), q.format.share) * times, q.codes).to(torch.int8), unit


def rounded(x: Tensor, format: Format) -> Tensor:
    """x as the format has it, in its own precision."""
    return dequantize(quantize(x, format)).to(x.dtype)


def grouped(x: Tensor, share: Share) -> Tensor:
    """[..., I] -> [..., G, N]: those who share a scale last; zeros fill the last group. [1, all] for the tensor."""
    if share == "tensor":
        return x.reshape(1, -1)
    if share == "row":
        return x.unsqueeze(-2)
    assert isinstance(share, int)
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % share)).unflatten(-1, (-1, share))


def _flat(g: Tensor, like: Tensor) -> Tensor:
    if g.shape[:-1] == (1,) and g.numel() == like.numel():
        return g.reshape(like.shape)
    return g.flatten(-2)[..., : like.shape[-1]]


def _power(reach: Tensor, format: Format) -> Tensor:
    """2^(floor(log2 amax) - the element's largest exponent): OCP Microscaling Formats 1.0, section 6.3."""
    top = torch.frexp(torch.tensor(format.most)).exponent - 1
    return torch.exp2((torch.frexp(reach).exponent - 1 - top).clamp(-127, 127).double())


def _stored(scale: Tensor, format: Format) -> Tensor:
    """As it is stored: float32, or e4m3 under one for the tensor, so that its largest is e4m3's (NVFP4)."""
    if format.scales == "float32":
        return scale.float().double()
    if format.scales == "whole":
        step = (scale.amax(-2, keepdim=True) / multiples(format)).float().double()
        return torch.ceil(scale / step * (1 - 1e-6)) * step
    total = scale.amax().float() / FLOATS["e4m3"]
    return ((scale / total).float().clamp(2**-9, 448).to(torch.float8_e4m3fn).float() * total).double()


def _coded(codes: Tensor, format: Format) -> Tensor:
    if format.element in INTEGERS:
        return torch.round(codes).to(torch.int8)
    if format.element == "e2m1":
        return _two_one(codes)
    return codes.float().to(DTYPES[format.element])


def _two_one(x: Tensor) -> Tensor:
    """The index of the nearest of `TWO_ONE`, 8 more below zero; of two as near, the one whose last bit is 0."""
    half = [(a + b) / 2 for a, b in pairwise(TWO_ONE)]
    size = x.abs()
    index = torch.zeros_like(size, dtype=torch.uint8)
    for i, edge in enumerate(half):
        index += ((size > edge) if i % 2 == 0 else (size >= edge)).to(torch.uint8)
    return index + 8 * (x < 0).to(torch.uint8)
