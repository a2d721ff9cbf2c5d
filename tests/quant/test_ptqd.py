"""PTQD: planted errors are found, taken out to the noise alone, and the noise is paid out of the sampler's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.quant.ptqd import Noise, slope_ddim, spared

K, DEVIATION = 0.2, 0.3
SHIFT = torch.tensor([0.5, -0.1, 0.0])


def planted(count: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """(eps, noise, what a quantized network says)."""
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(count, 3, 4, 4, generator=g)
    noise = DEVIATION * torch.randn(eps.shape, generator=g)
    return eps, noise, (1 + K) * eps + SHIFT.view(3, 1, 1) + noise


def test_what_was_planted_is_measured() -> None:
    eps, _, said = planted()
    found = Noise.measured(eps, said)
    assert found.k == pytest.approx(K, abs=5e-3)
    assert torch.allclose(found.mean, SHIFT, atol=5e-3)
    assert found.deviation == pytest.approx(DEVIATION, rel=5e-3)


def test_the_correction_leaves_the_noise_alone() -> None:
    """With the planted numbers, exactly; with the measured ones, of no mean and no correlation with eps."""
    eps, noise, said = planted()
    known = Noise(K, SHIFT, DEVIATION)
    assert torch.allclose(known.corrected(said), eps + noise / (1 + K), atol=1e-5)
    left = Noise.measured(eps, said).corrected(said) - eps
    assert float(left.transpose(0, 1).flatten(1).mean(1).abs().max()) < 1e-5
    # of eps / (1 + k)'s own part nothing is left: the slope of what remains is that of the shrunken answer
    assert abs(float((left * (eps - eps.mean())).mean())) < 1e-3
    assert float(left.std()) == pytest.approx(known.left(), rel=0.01)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_stochastic_step_ends_with_the_exact_networks_mean_and_variance(eta: float) -> None:
    """DDIM of a fixed state, 200,000 draws: the quantized network's noise takes the place of the sampler's."""
    a, b = 0.3, 0.5
    variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    g = torch.Generator().manual_seed(1)
    x, eps, n = 0.7, -0.4, 200_000
    z, q = torch.randn(n, generator=g).double(), 0.2 * torch.randn(n, generator=g).double()
    known = Noise(0.1, torch.tensor([0.3]), 0.2)
    said = ((1 + known.k) * eps + 0.3 + q).view(n, 1)
    slope = slope_ddim(a, b, variance)
    rest = spared(variance, slope, known.left())
    assert 0 < rest < variance
    new = (b / a) ** 0.5 * x + slope * known.corrected(said)[:, 0] + rest**0.5 * z
    mean = (b / a) ** 0.5 * x + slope * eps
    assert float(new.mean()) == pytest.approx(mean, abs=4e-3)
    assert float(new.var()) == pytest.approx(variance, rel=0.01)


def test_no_more_is_taken_off_than_there_is_and_nothing_from_a_deterministic_step() -> None:
    assert spared(0.0, -0.5, 0.3) == 0
    assert spared(0.01, -2.0, 0.3) == 0
    assert spared(0.04, 0.0, 0.3) == 0.04


def test_an_exact_network_needs_no_correction() -> None:
    eps, _, _ = planted(100)
    found = Noise.measured(eps, eps)
    assert (found.k, found.deviation) == (0, 0)
    assert torch.equal(found.corrected(eps), eps)
    with pytest.raises(ValueError, match="one shape"):
        Noise.measured(eps, eps[:1])
