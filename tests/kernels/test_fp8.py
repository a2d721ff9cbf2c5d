"""FlashAttention-3's float8: the rotation is exact, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import hadamard as matrix
from torch import Tensor

from hasten.kernels import fp8

pytestmark = pytest.mark.system("flashattention-3")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(generator: torch.Generator, *shape: int) -> Tensor:
    """N(0, 1), and for one entry in a thousand N(0, 100) more: the paper's section 4.3."""
    x, more = torch.randn(shape, generator=generator), 10 * torch.randn(shape, generator=generator)
    return x + more * (torch.rand(shape, generator=generator) < 0.001)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@pytest.mark.parametrize("c", [1, 2, 4, 32, 64, 128, 256])
def test_the_fast_transform_is_the_matrix_and_its_own_inverse(c: int) -> None:
    x = normal(3, 5, c).double()
    want = x @ torch.tensor(matrix(c), dtype=torch.float64) / math.sqrt(c)
    assert (fp8.hadamard(x) - want).abs().max() < 1e-13
    assert (fp8.hadamard(fp8.hadamard(x)) - x).abs().max() < 1e-13
    assert fp8.hadamard(x.float()).dtype == torch.float32


@pytest.mark.parametrize("c", [0, 3, 40, 96])
def test_other_channels_than_a_power_of_two_are_an_error(c: int) -> None:
    with pytest.raises(ValueError, match=f"power of two of channels, not {c}"):
        fp8.hadamard(torch.zeros(2, c))


def test_the_rotation_leaves_the_logits_and_spreads_an_outlier() -> None:
    q, k = normal(7, 64).double(), normal(9, 64, seed=1).double()
    s = fp8.signs(64, torch.Generator().manual_seed(2))
    assert s.abs().eq(1).all() and -32 < s.sum() < 32
    rotated = fp8.incoherent(q, s)
    assert (rotated @ fp8.incoherent(k, s).mT - q @ k.mT).abs().max() < 1e-12
    assert (rotated - fp8.hadamard(q)).abs().max() > 0.1  # signs come first: after the transform they undo nothing
    assert (rotated - fp8.hadamard(q * s)).abs().max() == 0
    one = torch.zeros(64)
    one[17] = 40
    assert fp8.incoherent(one, s).abs().equal(torch.full((64,), 5.0))
    flat = torch.full((64,), 5.0)  # what the transform alone would gather in one channel
    assert fp8.incoherent(flat, s).abs().max() < fp8.hadamard(flat).abs().max() / 2


def test_float8_saturates_and_keeps_what_is_not_a_number() -> None:
    x = torch.tensor([0.0, 1.06, 1.07, 447, 460, 1e9, -1e9, math.inf, math.nan, 2.0**-9])
    want = [0, 1, 1.125, 448, 448, 448, -448, 448, math.nan, 2.0**-9]
    assert fp8.e4m3(x).float().tolist() == pytest.approx(want, nan_ok=True, abs=0)


@pytest.mark.parametrize("block", [None, 128, 64, 7])
def test_every_block_has_the_scale_of_its_largest(block: int | None) -> None:
    x = normal(2, 3, 150, 20) * torch.logspace(-5, 5, 150)[:, None]
    x8, scale = fp8.quantize_blocks(x, block)
    assert x8.dtype == torch.float8_e4m3fn and scale.shape == (2, 3, 150, 1)
    assert ((x8.float() * scale - x).abs() <= torch.maximum(x.abs() / 16, scale / 1024) * (1 + 1e-5)).all()
    for at in range(0, 150, block or 150):
        some = slice(at, at + (block or 150))
        assert x8[:, :, some].float().abs().amax((2, 3)).eq(448).all()
        largest = x[:, :, some].abs().amax((2, 3), keepdim=True)
        assert torch.allclose(scale[:, :, some], (largest / 448).expand(-1, -1, scale[:, :, some].shape[2], -1))


def test_zeros_stay_zeros() -> None:
    x8, scale = fp8.quantize_blocks(torch.zeros(1, 9, 4))
    assert x8.float().count_nonzero() == 0 and scale.isfinite().all()


@pytest.mark.parametrize("block", [None, 64])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("peak", [None, fp8.PEAK])
def test_the_reference_is_attention_of_the_rounded_numbers(
    block: int | None, rotated: bool, peak: float | None
) -> None:
    q, k, v = 2 * normal(2, 100, 32), normal(2, 150, 32, seed=1), normal(2, 150, 32, seed=2) + 1
    s = fp8.signs(32, torch.Generator().manual_seed(3)) if rotated else None
    out = fp8.fp8_attention_reference(q, k, v, block, s, peak)
    turned = (q, k) if s is None else (fp8.incoherent(q, s), fp8.incoherent(k, s))
    left = [x8.float() * scale for x8, scale in (fp8.quantize_blocks(x, block) for x in (*turned, v))]
    want = exact(*left)
    assert (out - want).norm() / want.norm() < (2e-4 if peak is None else 1e-2)
    ones = fp8.fp8_attention_reference(q, k, torch.ones_like(v), block, s, peak)
    assert float(ones.mean()) == pytest.approx(1, abs=1e-3)  # roundings of P up and down


def test_blocks_and_rotation_nearly_halve_the_error_on_outliers() -> None:
    """The paper's table of RMSE against float64 has 2.4e-2 for one scale a tensor and P in float16, and 9.1e-3 for
    blocks and rotation: 2.6 times lower; without blocks hardly more, without rotation the baseline's. Here, with 128
    channels, the factor grows with the tokens: over 2,048 it is 1.6e-2 by 8.5e-3, 1.8 to 1.95 (four seeds), and over
    8,192 it is 2.4e-2 by 9.5e-3, 2.4 to 2.5 (two seeds)."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (outliers(g, 2, 2048, 128) for _ in range(3))
    s, want = fp8.signs(128, g), exact(q, k, v)

    def rmse(block: int | None, signs_C: Tensor | None, peak: float | None = fp8.PEAK) -> float:
        out = fp8.fp8_attention_reference(q, k, v, block, signs_C, peak)
        return float((out - want).square().mean().sqrt())

    plain, whole, no_blocks, no_rotation = rmse(None, None, None), rmse(128, s), rmse(None, s), rmse(128, None)
    assert plain > 1.7 * whole
    assert 0.95 * whole < no_blocks < 1.2 * whole
    assert no_rotation > 1.6 * whole
