"""AdaRound: where it starts, where it ends, and that it finds the better choice among all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hasten.format import Codes, Format, dequantize, quantize, scales
from hasten.quant.adaround import Rounding, beta

FORMATS = [Format("int4", "row"), Format("int4", 4), Format("int3", 4, False), Format("int4", "tensor", False)]


def weights(outputs: int = 3, inputs: int = 10) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_it_starts_at_the_weights_and_its_choice_at_their_nearest_codes(format: Format) -> None:
    w = weights()
    start = Rounding(w, format, *scales(w, format))
    codes = quantize(w, format).codes
    inside = (codes > codes.min()) & (codes < codes.max())  # a zero point's rounding cuts the ends
    assert torch.allclose(start()[inside], w[inside], atol=2e-4)
    assert torch.equal(start.codes().codes, quantize(w, format).codes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decided_weights_are_their_codes_and_cost_nothing(format: Format) -> None:
    w = weights()
    rounding = Rounding(w, format, *scales(w, format))
    assert float(rounding.undecided(2.0).detach()) > 1
    with torch.no_grad():
        rounding.v.copy_(torch.where(torch.arange(rounding.v.numel()).view_as(rounding.v) % 3 == 0, 9.0, -9.0))
    assert float(rounding.undecided(2.0).detach()) == 0
    assert torch.equal(rounding().detach(), dequantize(rounding.codes()))
    step = (dequantize(rounding.codes()) - w).abs() / float(rounding.scale.max())
    assert float(step.max()) <= 1.51  # a step up or down, and the half that a range's end or zero point takes


def test_the_exponent_falls_in_a_line_after_the_free_part() -> None:
    assert [beta(i, 100) for i in (0, 19)] == [None, None]
    assert beta(20, 100) == pytest.approx(20)
    assert beta(60, 100) == pytest.approx(11)
    assert beta(100, 100) == pytest.approx(2)


def learned(w: Tensor, x: Tensor, format: Format, steps: int = 1500) -> Codes:
    rounding = Rounding(w, format, *scales(w, format))
    optimizer = torch.optim.Adam(rounding.parameters(), 2e-2)
    for i in range(steps):
        loss = ((rounding() - w) @ x.T).square().sum(0).mean()
        if (power := beta(i, steps)) is not None:
            loss = loss + 0.5 * rounding.undecided(power)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(rounding.undecided(2.0).detach()) < 0.5
    return rounding.codes()


def test_it_finds_nearly_the_best_of_all_choices() -> None:
    """One row of ten weights, 1,024 ways to round it; the inputs go together."""
    g = torch.Generator().manual_seed(1)
    w, format = weights(1, 10), Format("int3", "row")
    x = torch.randn(300, 10, generator=g) + 1.5 * torch.randn(300, 1, generator=g)
    scale = scales(w, format)[0].view(1, 1)

    def off(said: Tensor) -> float:
        return float(((said - w) @ x.T).square().mean())

    ways = torch.tensor(list(itertools.product((0, 1), repeat=10)), dtype=torch.float32)
    every = ((w / scale).floor() + ways).clamp(-3, 3) * scale
    best = min(off(row[None]) for row in every)
    nearest = off(dequantize(quantize(w, format)))
    found = off(dequantize(learned(w, x, format)))
    assert best <= found < best + 0.2 * (nearest - best)
