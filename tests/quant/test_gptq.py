"""GPTQ: its recursion against the least squares that it stands for, and what it gains on inputs that go together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.format import FP8, NVFP4, Codes, Format, dequantize, encode, quantize, scales
from hasten.quant.gptq import gptq, hessian

FORMATS = [Format("int4", 8), Format("int4", "row"), Format("int4", 8, False), Format("int3", "tensor"), FP8, NVFP4]


def layer(outputs: int = 6, inputs: int = 32, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Weights, and inputs whose channels go together and differ in size."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(inputs, inputs, generator=g) + 3 * torch.randn(inputs, 1, generator=g)
    x = torch.randn(rows, inputs, generator=g) @ mixed
    return torch.randn(outputs, inputs, generator=g), x


def slow(w: Tensor, h: Tensor, format: Format, damp: float = 0.01) -> Tensor:
    """One input after the other is rounded, and those to come are solved anew from all errors so far."""
    h = h.double() + damp * h.double().diagonal().mean() * torch.eye(len(h))
    want, now, done = w.double(), w.double().clone(), torch.zeros(0)
    size = format.share if isinstance(format.share, int) else w.shape[1]
    one, shared = format.sharing("tensor" if format.share == "tensor" else "row"), scales(w.double(), format)
    for i in range(w.shape[1]):
        if format.share != "tensor" and format.scales == "float32":
            if i % size == 0:
                scale, zero = scales(now[:, i : i + size], one)
        else:
            scale, zero = shared[0] if format.share == "tensor" else shared[0][:, i // size : i // size + 1], None
        now[:, i] = dequantize(encode(now[:, i : i + 1], one, scale, zero))[:, 0]
        done = torch.arange(i + 1)
        rest = torch.arange(i + 1, w.shape[1])
        moved = (now[:, done] - want[:, done]) @ h[done][:, rest]
        now[:, rest] = want[:, rest] - torch.linalg.solve(h[rest][:, rest], moved.T).T
    return now.float()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_is_least_squares_solved_anew_after_each_input(format: Format) -> None:
    w, x = layer()
    assert torch.allclose(dequantize(gptq(w, hessian(x), format)), slow(w, hessian(x), format), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_on_inputs_that_go_each_its_own_way_it_rounds_to_nearest(format: Format) -> None:
    w, _ = layer()
    found, plain = gptq(w, torch.eye(32), format), quantize(w, format)
    assert torch.equal(found.codes.float(), plain.codes.float())
    assert torch.equal(found.scale, plain.scale)


def test_it_errs_less_than_rounding_to_nearest() -> None:
    w, x = layer(48, 96, 600)

    def off(codes: Codes) -> float:
        return float(((dequantize(codes) - w) @ x.T).square().mean())

    for format in (Format("int4", 32), Format("int3", 32), Format("int4", "row", False)):
        assert off(gptq(w, hessian(x), format)) < 0.35 * off(quantize(w, format)), format


def test_inputs_that_are_never_seen_do_no_harm() -> None:
    w, x = layer()
    x[:, [2, 17]] = 0
    found = dequantize(gptq(w, hessian(x), Format("int8")))
    assert float((found - w)[:, [2, 17]].abs().max()) < float(w.abs().amax()) / 127
    assert bool(torch.isfinite(found).all())
    with pytest.raises(ValueError, match="not finite"):
        gptq(w, hessian(x * torch.nan), Format("int4"))
