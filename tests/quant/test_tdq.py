"""Learned steps have LSQ's gradient; TDQ's network starts where it is told, is tabulated exactly, and follows ranges
that move with time, which one step cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.quant.learned_step import first_step, learned_step, scaled_gradient
from hasten.quant.tdq import StepOfTime


def test_the_gradient_is_lsqs() -> None:
    x = torch.tensor([-9.0, -1.3, -0.2, 0.6, 2.45, 7.9], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    out = learned_step(x, step, -4, 3)
    assert torch.allclose(out.detach(), 0.7 * (x.detach() / 0.7).round().clamp(-4, 3))
    ups = torch.arange(1.0, 7.0, dtype=torch.float64)
    (out * ups).sum().backward()
    places = x.detach() / 0.7
    inside = (places > -4) & (places < 3)
    of_step = torch.where(inside, places.round() - places, places.clamp(-4, 3))
    assert x.grad is not None
    assert step.grad is not None
    assert torch.allclose(x.grad, torch.where(inside, ups, 0.0))
    assert float(step.grad) == pytest.approx(float((of_step * ups).sum()))


def test_a_scaled_gradient_leaves_the_value() -> None:
    step = torch.tensor(0.3, requires_grad=True)
    out = scaled_gradient(step, 0.01)
    (5 * out).backward()
    assert float(out.detach()) == pytest.approx(0.3)
    assert step.grad is not None
    assert float(step.grad) == pytest.approx(0.05)
    assert float(first_step(torch.full((4,), -2.0), 4)) == pytest.approx(2)


@pytest.mark.parametrize("start", [1e-3, 0.5, 200.0])
def test_it_starts_near_where_it_is_told_and_its_table_is_its_answer(start: float) -> None:
    torch.manual_seed(0)
    net = StepOfTime(start)
    times = [999.0, 500.0, 1.0]
    found = net.table(times)
    assert bool((found > 0).all())
    assert torch.allclose(found, torch.full((3,), start), rtol=0.35, atol=0.3)
    assert net.training
    with torch.no_grad():
        assert torch.equal(found, net.eval()(torch.tensor(times)))
    with pytest.raises(ValueError, match="positive"):
        StepOfTime(0.0)


def ranges(t: Tensor) -> Tensor:
    """Planted: activations are nine times as large at the end as at the start."""
    return 0.5 + 4 * (t / 1000) ** 2


def test_it_follows_ranges_that_move_with_time() -> None:
    """Four bits: after a few hundred steps on mixed times, at each of ten times it errs as the best step of that time
    within a seventh, where one step for all errs twice as much on the mean."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    net, low, high = StepOfTime(0.5), -7, 7
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(500):
        t = torch.rand(16, generator=rng) * 1000
        x = ranges(t)[:, None] * torch.randn(16, 256, generator=rng)
        loss = ((learned_step(x, net(t)[:, None], low, high) - x).square().mean(1) / ranges(t).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    times = [50.0 + 100 * i for i in range(10)]
    found, ours, best = net.table(times), [], []
    samples = [float(ranges(torch.tensor(t))) * torch.randn(20_000, generator=rng) for t in times]

    def off(x: Tensor, step: float) -> float:
        return float((learned_step(x, torch.tensor(step), low, high) - x).square().mean())

    grid = [0.02 * 1.06**i for i in range(80)]
    for x, step in zip(samples, found.tolist(), strict=True):
        ours.append(off(x, step))
        best.append(min(off(x, s) for s in grid))
    one = min(sum(off(x, s) / b for x, b in zip(samples, best, strict=True)) / 10 for s in grid)
    assert max(a / b for a, b in zip(ours, best, strict=True)) < 1.15
    assert one > 2
