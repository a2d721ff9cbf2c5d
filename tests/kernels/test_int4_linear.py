"""W4A8: widened weights are the codes times their multiples, and the product is int8's, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.format import INT4_IN_INT8, Codes, Format, dequantize, in_int8, quantize
from hasten.kernels.int4_linear import Int4, int4_linear, widened
from hasten.kernels.int8_linear import int8_linear, int8_linear_reference, pack

pytestmark = pytest.mark.usefixtures("compiler")
SHAPES = [(5, 64, 16), (1, 70, 24), (33, 200, 8)]


def made(m: int, k: int, n: int, share: int = 64) -> tuple[Tensor, Codes, Tensor]:
    g = torch.Generator().manual_seed(m + k + n)
    w = torch.randn(n, k, generator=g) * torch.logspace(-3, 3, n)[:, None]
    return (
        torch.randn(m, k, generator=g),
        quantize(w, Format("int4", share, scales="whole")),
        torch.randn(n, generator=g),
    )


@pytest.mark.parametrize("share", [16, 64])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_widened_weights_are_codes_times_their_multiples(m: int, k: int, n: int, share: int) -> None:
    _, q, _ = made(m, k, n, share)
    w = Int4.of(q)
    whole, unit = in_int8(q)
    assert w.packed.shape == (n, math.ceil(k / 2))
    assert w.times.shape == (n, math.ceil(k / share))
    for wide in (w.wide(), widened(w.packed, w.times, k, share)):
        assert wide.dtype == torch.int8
        assert torch.equal(wide, whole)
    assert torch.allclose(w.wide().float() * w.unit, dequantize(q), rtol=1e-5, atol=0)
    assert torch.equal(w.unit, unit)


@pytest.mark.parametrize("activations", ["token", "tensor"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_it_is_the_integer_product(m: int, k: int, n: int, activations: Any) -> None:
    x, q, bias = made(m, k, n)
    w = Int4.of(q)
    with torch.no_grad():
        got = int4_linear(x, w, bias, activations)
        assert torch.equal(got, int8_linear(x, pack(w.wide()), w.unit, bias, activations))
    want = int8_linear_reference(x, w.wide(), w.unit, bias, activations)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_it_errs_as_four_bits_in_groups_do() -> None:
    """On normal data about a tenth, little more than with scales that need not be whole."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(256, 512, generator=g), torch.randn(64, 512, generator=g)
    exact = x @ w.T

    def off(said: Tensor) -> float:
        return float((said - exact).norm() / exact.norm())

    with torch.no_grad():
        ours = off(int4_linear(x, Int4.of(quantize(w, INT4_IN_INT8))))
    free = off(x @ dequantize(quantize(w, Format("int4", 64))).T)
    row = off(x @ dequantize(quantize(w, Format("int4", "row"))).T)
    assert free < ours < 1.15 * free
    assert ours < 0.9 * row


def test_it_takes_a_quarter_of_the_bytes() -> None:
    """Of float16: half a byte a weight, one byte for 64 of them, four a row: 0.26."""
    w = Int4.of(quantize(torch.randn(512, 3072, generator=torch.Generator().manual_seed(0)), INT4_IN_INT8))
    size = sum(t.numel() * t.element_size() for t in (w.packed, w.times, w.unit))
    assert size / (512 * 3072 * 2) < 0.26


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="whole multiples as scales"):
        Int4.of(quantize(torch.ones(2, 4), Format("int4", 64)))
