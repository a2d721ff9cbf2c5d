"""Formats: bounds over twelve decades, what they say exactly, and agreement with what torch and the standards say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hasten.format import (
    BINARY,
    FLOATS,
    FP8,
    INTEGERS,
    MXFP4,
    MXFP8,
    NVFP4,
    TWO_ONE,
    Format,
    dequantize,
    encode,
    grouped,
    in_int8,
    quantize,
    rounded,
)  # fmt: skip

SHARES = ("tensor", "row", 16, 7)
MANTISSA = {"e4m3": (3, 2.0**-9), "e5m2": (2, 2.0**-16), "e2m1": (1, 0.5)}
"""Mantissa bits and the least step."""


def numbers(rows: int = 24, columns: int = 50, seed: int = 0) -> Tensor:
    """Rows whose sizes are spread over twelve decades, each with zeros and its own outlier."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g) * 10 ** (torch.rand(rows, 1, generator=g) * 12 - 6)
    x[:, 3] *= 100
    x[:, 5] = 0
    return x


def steps(q: object) -> Tensor:
    return q.scale.double()  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("element", INTEGERS)
def test_integers_are_within_their_bound(element: str, symmetric: bool, share: object) -> None:
    x = numbers()
    q = quantize(x, Format(element, share, symmetric))  # type: ignore[arg-type]
    off = grouped((dequantize(q).double() - x.double()).abs(), share)  # type: ignore[arg-type]
    size = grouped(x.double().abs(), share).amax(-1, True)  # type: ignore[arg-type]
    assert bool((off <= steps(q) * (0.5 if symmetric else 1.0) + 3e-7 * size).all())
    most = 2 ** (INTEGERS[element] - 1) - 1 if symmetric else 2 ** INTEGERS[element] - 1
    assert int(q.codes.max()) <= most
    assert int(q.codes.min()) >= (-most if symmetric else 0)
    assert bool((dequantize(q)[:, 5] == 0).all())  # zero is always one of the numbers


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("element", FLOATS)
def test_floats_are_within_their_bound(element: str, share: object) -> None:
    x = numbers(seed=1)
    q = quantize(x, Format(element, share))  # type: ignore[arg-type]
    bits, least = MANTISSA[element]
    off = grouped((dequantize(q).double() - x.double()).abs(), share)  # type: ignore[arg-type]
    wide = grouped(x.double().abs(), share)  # type: ignore[arg-type]
    bound = torch.maximum(wide * 2.0 ** -(bits + 1), steps(q) * least / 2)
    assert bool((off <= bound + 3e-7 * wide.amax(-1, True)).all())


@pytest.mark.parametrize("format", [MXFP4, MXFP8], ids=["mxfp4", "mxfp8"])
def test_scales_of_mx_are_powers_of_two_and_largest_numbers_saturate_by_a_third_at_most(format: Format) -> None:
    x = numbers(columns=64, seed=2)
    q = quantize(x, format)
    assert bool((q.scale.log2() == q.scale.log2().round()).all())
    reach = grouped(x, 32).abs().amax(-1, True)
    over = reach / (q.scale * format.most)
    assert 1.0 < float(over.max()) <= 4 / 3 + 1e-6
    assert bool((reach / q.scale >= 2.0 ** math.floor(math.log2(format.most)) * (1 - 1e-6)).all())


def test_scales_of_nvfp4_are_e4m3_under_one_of_the_tensor() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-1, 1, 8)[:, None]
    q = quantize(x, NVFP4)
    total = float(x.abs().max()) / (6 * 448)
    shares = q.scale / total
    assert torch.allclose(shares.to(torch.float8_e4m3fn).float(), shares, rtol=1e-6)
    assert float(shares.max()) == pytest.approx(448)
    off = (grouped(dequantize(q) - x, 16).abs() / grouped(x, 16).abs().amax(-1, True)).max()
    assert float(off) < 1 / 6 + 1 / 16  # half a step of the largest, and its scale's rounding


def test_e2m1_is_the_nearest_of_its_table_and_ties_go_to_the_even_code() -> None:
    x = torch.linspace(-6, 6, 12 * 64 + 1)
    q = encode(x, Format("e2m1", "tensor"), torch.ones(1, 1))
    table = torch.tensor(TWO_ONE)
    for value, said in zip(x.tolist(), dequantize(q).tolist(), strict=True):
        apart = (table - abs(value)).abs()
        near = [i for i, d in enumerate(apart.tolist()) if d == float(apart.min())]
        want = next(i for i in near if len(near) == 1 or i % 2 == 0)
        assert abs(said) == TWO_ONE[want]
        assert said * value >= 0


@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_eight_bit_floats_are_torchs_own(element: str) -> None:
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[element]
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = codes[torch.isfinite(codes)]
    said = dequantize(encode(every, Format(element, "tensor"), torch.ones(1, 1)))  # type: ignore[arg-type]
    assert torch.equal(said, every)


def test_signs_have_the_scale_of_least_square_error() -> None:
    x = numbers(seed=4)
    said = dequantize(quantize(x, BINARY))
    best = (said - x).double().square().sum(1)
    for factor in (0.97, 1.03):
        assert bool(((said * factor - x).double().square().sum(1) > best).all())


@pytest.mark.parametrize(
    "format",
    [Format(e, s, sym) for e, s, sym in itertools.product(INTEGERS, SHARES, (True, False))]  # type: ignore[arg-type]
    + [FP8, MXFP4, MXFP8, NVFP4, BINARY, Format("e5m2", "tensor")],
    ids=str,
)
def test_what_is_rounded_stays_in_every_format(format: Format) -> None:
    """So a checkpoint of rounded weights says the same codes again; signs of zero excepted, whose mean moves."""
    x = numbers(columns=64, seed=5) if format is not BINARY else numbers(columns=64, seed=5) + 1e-9
    once = rounded(x, format)
    if format.symmetric and format.scales == "float32":
        assert torch.allclose(rounded(once, format), once, rtol=1e-5, atol=0)
    q = quantize(x, format)
    assert q.codes.shape == x.shape
    assert torch.equal(dequantize(q), once)


@pytest.mark.parametrize("element", ["int6", "int4", "int3", "int2"])
def test_whole_multiples_are_eight_bit_integers_of_one_scale_a_row(element: str) -> None:
    """And within half a step, whose size is at most that of the group's own and one unit of the row."""
    x, format = numbers(columns=70, seed=7), Format(element, 16, scales="whole")  # type: ignore[arg-type]
    q = quantize(x, format)
    whole, unit = in_int8(q)
    assert torch.allclose(whole.float() * unit, dequantize(q), rtol=1e-5, atol=0)
    assert int(whole.abs().max()) <= 127
    off = grouped((dequantize(q) - x).abs().double(), 16)
    own = grouped(x.double().abs(), 16).amax(-1, True) / format.most
    assert bool((off <= (own + unit.double().unsqueeze(-1)) / 2 * (1 + 1e-5)).all())


def test_groups_of_zeros_constants_and_single_rows() -> None:
    for format in (Format("int4", 16), Format("int4", 16, False), FP8, MXFP4, NVFP4, BINARY, Format("int2", "row")):
        assert torch.equal(rounded(torch.zeros(1, 33), format), torch.zeros(1, 33)), format
        if format not in (FP8, MXFP4):
            constant = torch.full((3, 33), 0.7)
            assert torch.allclose(rounded(constant, format), constant, rtol=0.08), format
        assert rounded(torch.randn(1, 1), format).shape == (1, 1)


def test_an_outlier_hurts_its_group_alone() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    x[0, 0] = 1e4
    apart = (rounded(x, Format("int8", 16)) - x).abs()
    assert float(apart[0, 16:].max()) < 0.02
    assert float(apart[0, 1:16].max()) > 0.5
    assert float((rounded(x, Format("int8", "tensor")) - x).abs()[3].max()) > 0.5


def test_what_has_no_number_is_refused() -> None:
    x = torch.ones(2, 4)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="1 of 8 numbers are not finite"):
        quantize(x, FP8)
    with pytest.raises(ValueError, match="symmetric integers below 8 bits, not e4m3"):
        Format("e4m3", 16, scales="whole")
    with pytest.raises(ValueError, match="zero point is for integers"):
        Format("e4m3", symmetric=False)
    with pytest.raises(ValueError, match="one number or more, not 0"):
        Format("int4", 0)
