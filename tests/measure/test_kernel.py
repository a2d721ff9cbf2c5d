"""The kernel distance is unbiased, which the Frechet distance is not."""

import pytest
import torch

from hasten.measure.frechet import frechet_small
from hasten.measure.kernel import kernel_distance


def slow(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_equals_the_double_loop(block):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(9, 5, generator=rng, dtype=torch.float64)
    y = torch.randn(13, 5, generator=rng, dtype=torch.float64) * 2 + 1
    assert kernel_distance(x, y, block) == pytest.approx(slow(x, y), rel=1e-10)


def test_its_mean_is_zero_for_equal_laws_however_small_the_sets():
    rng = torch.Generator().manual_seed(1)
    pairs = [torch.randn(2, 6, 16, generator=rng, dtype=torch.float64) for _ in range(2000)]
    found = torch.tensor([kernel_distance(x, y) for x, y in pairs])
    assert found.mean().abs() < 3 * found.std() / len(found) ** 0.5
    assert (found < 0).any()
    assert min(frechet_small(x, y) for x, y in pairs[:50]) > 1  # the biased one can't be that small


def test_tells_laws_apart_that_differ_in_shape_alone():
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(500, 4, generator=rng, dtype=torch.float64)
    skewed = torch.empty(500, 4, dtype=torch.float64).exponential_(generator=rng) - 1  # the same mean and covariance
    same = kernel_distance(x[:250], x[250:])
    assert kernel_distance(x, skewed) > 10 * abs(same)


def test_says_what_it_wants():
    with pytest.raises(ValueError, match="2 samples or more a set"):
        kernel_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 4\]"):
        kernel_distance(torch.zeros(2, 3), torch.zeros(2, 4))
