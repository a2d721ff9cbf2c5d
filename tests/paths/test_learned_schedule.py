"""A learnt schedule rises whatever its weights, and what it learns reaches its weights."""

from __future__ import annotations

import pytest
import torch

from hasten.paths.learned import Ends, Rising
from hasten.paths.log_snr import LogSNR

T = torch.linspace(0, 1, 301, dtype=torch.float64)


@pytest.mark.system("vdm")
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_it_rises_from_0_to_1_whatever_its_weights(scale: float) -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        shape = Rising(16, rng)
        with torch.no_grad():
            for p in shape.parameters():
                p.copy_(scale * torch.randn(p.shape, generator=rng))
        u = shape.fixed()(T)
        assert (u[0], u[-1]) == (0, 1)
        assert u.diff().min() > 0


def test_it_starts_near_the_straight_line_and_learns_another() -> None:
    rng = torch.Generator().manual_seed(1)
    shape = Rising(32, rng)
    assert (shape(T) - T).abs().max() < 0.15
    moves = torch.optim.Adam(shape.parameters(), 0.03)
    for _ in range(300):
        moves.zero_grad()
        ((shape(T) - T**3) ** 2).mean().backward()
        moves.step()
    assert (shape(T) - T**3).abs().max() < 0.03
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in shape.parameters())


def test_a_fixed_copy_stays_while_the_shape_learns_on() -> None:
    shape = Rising(8, torch.Generator().manual_seed(2))
    path = LogSNR(-9.0, 5.0, shape.fixed())
    before = path.gamma(T)
    with torch.no_grad():
        shape.bias.add_(3)
    assert torch.equal(path.gamma(T), before)
    assert not before.requires_grad
    assert (path.time(-before / 2) - T).abs().max() < 1e-9


def test_ends_rise_whatever_is_learnt() -> None:
    ends = Ends(-8.0, 4.0)
    assert [float(e.detach()) for e in ends()] == pytest.approx([-8.0, 4.0])
    with torch.no_grad():
        ends.log_rise.sub_(30)
    first, last = ends()
    assert last >= first
    with pytest.raises(ValueError, match="gamma must rise"):
        Ends(1.0, -1.0)
