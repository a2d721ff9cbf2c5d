"""Fidelity follows its formulas."""

import math

import pytest
import torch

from hasten.measure.fidelity import feature_distance, feature_distances, psnr


def test_psnr_of_a_known_error():
    a = torch.full((3, 3, 8, 8), 0.5)
    b = a.clone()
    b[0] += 0.1  # mean squared error 0.01: 20 dB
    b[1, 0] += 0.1  # one channel of three: 20 + 10 log10 3
    found = psnr(a, b)
    assert found[:2].tolist() == pytest.approx([20, 20 + 10 * math.log10(3)], abs=1e-4)
    assert found[2] == math.inf


def test_halving_the_error_gains_six_decibel():
    rng = torch.Generator().manual_seed(0)
    a, e = torch.rand(2, 4, 3, 16, 16, generator=rng)
    gained = psnr(a, a + e / 2) - psnr(a, a + e)
    torch.testing.assert_close(gained, torch.full_like(gained, 20 * math.log10(2)), atol=1e-4, rtol=0)


def test_feature_distance_at_known_angles_and_any_length():
    x = torch.tensor([[1.0, 0], [2, 0], [0, 3], [-1, 0], [1, 1], [0, 0]])
    expected = [0, 0, 1, 2, 1 - 0.5**0.5, 1]
    assert feature_distance(x[:1].expand_as(x), x).tolist() == pytest.approx(expected, abs=1e-12)


def test_all_pairs_are_each_pair():
    rng = torch.Generator().manual_seed(1)
    a, b = torch.randn(5, 7, generator=rng), torch.randn(4, 7, generator=rng)
    expected = torch.stack([feature_distance(row.expand_as(b), b) for row in a])
    torch.testing.assert_close(feature_distances(a, b), expected, rtol=0, atol=1e-12)


def test_what_is_not_finite_is_not_near():
    x = torch.ones(2, 3)
    x[1, 0] = torch.nan
    assert feature_distance(torch.ones(2, 3), x).isnan().tolist() == [False, True]


def test_says_what_it_wants():
    with pytest.raises(ValueError, match="uint8"):
        psnr(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[1, 3\]"):
        feature_distance(torch.zeros(2, 3), torch.zeros(1, 3))
