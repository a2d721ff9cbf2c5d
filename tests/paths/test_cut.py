"""A path without its noisy end is the path it was cut from, its times scaled."""

from __future__ import annotations

import pytest
import torch

from hasten.path import lam
from hasten.paths.cut import Cut
from hasten.paths.gvp import GVP
from hasten.paths.preserving import Preserving

T = torch.linspace(0, 1, 33, dtype=torch.float64)


@pytest.mark.parametrize("base", [GVP(), Preserving()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("last", [0.3, 0.99, 1.0])
def test_a_cut_path_is_its_base_up_to_there(base: GVP | Preserving, last: float) -> None:
    cut = Cut(base, last)
    assert torch.equal(cut.alpha(T), base.alpha(last * T))
    assert torch.equal(cut.sigma(T), base.sigma(last * T))
    assert (cut.time(lam(cut, T[1:])) - T[1:]).abs().max() < 1e-9
    end = torch.tensor(1.0, dtype=torch.float64)
    assert float(lam(cut, end)) == float(lam(base, last * end))


@pytest.mark.parametrize("last", [0.0, -0.5, 1.01, float("nan")])
def test_a_cut_outside_the_path_is_refused(last: float) -> None:
    with pytest.raises(ValueError, match="the last time lies in"):
        Cut(GVP(), last)
