"""The Frechet distance is that of the two Gaussians, whichever way it is computed."""

import pytest
import torch

from hasten.measure.frechet import Moments, frechet, frechet_small

pytestmark = pytest.mark.system("fid")


def draw(n, d, seed, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=rng, dtype=torch.float64) / d**0.5
    return torch.randn(n, d, generator=rng, dtype=torch.float64) @ mix + shift


def known(mean, covariance):
    return Moments(2, mean, covariance)  # the scatter of 2 samples is their covariance


def test_closed_form_where_covariances_commute():
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64)).Q
    p, q = torch.rand(2, 6, generator=rng, dtype=torch.float64).add(0.1)
    m, n = torch.randn(2, 6, generator=rng, dtype=torch.float64)
    expected = (m - n).square().sum() + (p.sqrt() - q.sqrt()).square().sum()
    found = frechet(known(m, basis * p @ basis.mT), known(n, basis * q @ basis.mT))
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_equals_the_root_of_scipy_where_they_do_not_commute():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = Moments.of(draw(400, 12, 1)), Moments.of(draw(500, 12, 2, 0.3))
    root = torch.from_numpy(linalg.sqrtm((a.covariance @ b.covariance).numpy()).real)
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance - 2 * root).trace()
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_in_parts_are_those_at_once(offset):
    x = draw(300, 5, 3) + offset
    parts = Moments()
    for part in x.split([1, 0, 7, 92, 200]):
        parts.update(part)
    merged = Moments.of(x[:120]).merge(Moments()).merge(Moments.of(x[120:]))
    for found in (parts, merged):
        assert found.count == 300
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.covariance, x.mT.cov(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 200), (30, 20, 7), (2, 2, 50)])
def test_small_equals_full(n, m, d):
    x, y = draw(n, d, 4), draw(m, d, 5, 0.2)
    assert frechet_small(x, y) == pytest.approx(frechet(Moments.of(x), Moments.of(y)), rel=1e-6, abs=1e-9)


def test_zero_for_one_set_and_symmetric():
    x, y = draw(40, 90, 6), draw(50, 90, 7, 0.1)
    for distance in (frechet_small, lambda a, b: frechet(Moments.of(a), Moments.of(b))):
        assert distance(x, x) == pytest.approx(0, abs=1e-6)
        assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)


def test_one_average_picture_is_at_the_trace_of_the_covariance():
    y = draw(60, 80, 8)
    one = y.mean(0).expand(60, -1)
    assert frechet_small(one, y) == pytest.approx(float(y.mT.cov().trace()), rel=1e-10)


def test_says_what_it_wants():
    with pytest.raises(ValueError, match="2 samples or more, got 1"):
        frechet(Moments.of(torch.zeros(1, 3)), Moments.of(torch.zeros(4, 3)))
    with pytest.raises(ValueError, match="features of 3 and 4 numbers"):
        Moments.of(torch.zeros(2, 3)).merge(Moments.of(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        frechet_small(torch.zeros(2, 3), torch.zeros(2, 4))
