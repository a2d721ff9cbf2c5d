"""Searched ranges: never worse than the largest number's, and what a search over the whole grid finds."""

from __future__ import annotations

import pytest
import torch

from hasten.format import FP8, Format, dequantize, encode, grouped, quantize
from hasten.quant.ranges import searched


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("share", ["tensor", "row", 32])
@pytest.mark.parametrize("element", ["int8", "int4"])
def test_each_group_has_the_best_of_all_narrowed_ranges(element: str, share: object, symmetric: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=g).pow(3)
    format = Format(element, share, symmetric)  # type: ignore[arg-type]
    scale, zero = searched(x, format)

    def off(s: torch.Tensor) -> torch.Tensor:
        apart = (dequantize(encode(x, format, s, zero)) - x).double().abs().pow(2.4)
        return grouped(apart, format.share).mean(-1, keepdim=True)

    plain = quantize(x, format)
    every = torch.stack([off(plain.scale * (1 - i / 100)) for i in range(80)])
    assert torch.allclose(off(scale), every.amin(0), rtol=1e-4)
    if element == "int4":
        assert float(off(scale).mean()) < float(off(plain.scale).mean())


def test_numbers_without_outliers_keep_their_range() -> None:
    x = torch.linspace(-1, 1, 255)[None]
    assert torch.allclose(searched(x, Format("int8"))[0], quantize(x, Format("int8")).scale)


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="integers with float32 scales"):
        searched(torch.ones(1, 4), FP8)
