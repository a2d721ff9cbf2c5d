"""Codes packed into bytes: a bijection of every code at every place, and as few bytes as promised."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.format import BINARY, FP8, MXFP4, NVFP4, Format, quantize
from hasten.kernels.packed import WIDTHS, pack_bits, restored, stored, unpack_bits


@pytest.mark.parametrize("count", [1, 2, 7, 8, 33])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place_comes_back(bits: int, count: int) -> None:
    for shift in range(2**bits):
        codes = (torch.arange(count) * 5 + shift).remainder(2**bits).expand(3, 2, count)
        packed = pack_bits(codes, bits)
        assert packed.shape == (3, 2, math.ceil(count * bits / 8))
        assert torch.equal(unpack_bits(packed, bits, count), codes.to(torch.uint8))


def test_all_bytes_are_used() -> None:
    """So it is a bijection the other way, too."""
    for bits in WIDTHS:
        every = torch.arange(256, dtype=torch.uint8).unsqueeze(-1)
        assert torch.equal(pack_bits(unpack_bits(every, bits, 8 // bits), bits), every)


@pytest.mark.parametrize(
    "format",
    [Format("int4", 16), Format("int4", 16, False), Format("int2", "row"), Format("int2", "row", False), BINARY, NVFP4,
     MXFP4, FP8, Format("int8"), Format("int6"), Format("int3", 8, False)],
    ids=str,
)  # fmt: skip
def test_codes_of_every_format_come_back(format: Format) -> None:
    q = quantize(torch.randn(5, 37, generator=torch.Generator().manual_seed(0)), format)
    small = stored(q)
    assert small.dtype.itemsize == 1
    assert small.shape[-1] == math.ceil(37 * format.bits / 8) or format.bits not in WIDTHS
    back = restored(small, format, 37)
    assert back.dtype == q.codes.dtype
    assert torch.equal(back.view(torch.uint8), q.codes.view(torch.uint8))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codes of 4 bits lie in \[0, 15\], not \[0, 16\]"):
        pack_bits(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="do not fill bytes evenly"):
        pack_bits(torch.tensor([0]), 3)
