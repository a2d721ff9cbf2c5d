"""Weights of the last residuals, and ways whose jumps depend on the jump before, against slow ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from hasten.cache.taylor import weights
from hasten.fit.mixing import Products
from hasten.fit.shortest import shortest, shortest_pairs


def test_weights_are_those_of_least_squares_over_all_pictures() -> None:
    rng = torch.Generator().manual_seed(0)
    products = Products()
    pictures = [{s: torch.randn(50, generator=rng) for s in range(4)} for _ in range(3)]
    for p in pictures:
        products.add(3, p)
    for kept in ((2,), (2, 1), (1, 0)):
        a = torch.stack([torch.cat([p[i] for p in pictures]) for i in kept], 1).double()
        b = torch.cat([p[3] for p in pictures]).double()
        want = torch.linalg.lstsq(a, b[:, None]).solution[:, 0]
        got, left = products.mixed(3, *kept)
        assert got == pytest.approx(want.tolist(), abs=1e-5)
        repeated = (a[:, 0] - b).square().sum()
        assert left == pytest.approx(float((a @ want - b).square().sum() / repeated), rel=1e-4)


def test_what_is_linear_in_the_step_is_found_exactly() -> None:
    """With the weights of the line through two points."""
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 40, generator=rng)
    products = Products()
    products.add(7, {s: a + s * b for s in (2, 4, 7)})
    got, left = products.mixed(7, 4, 2)
    assert got == pytest.approx(weights([4, 2], 7), rel=1e-2)  # up to the ridge
    assert left < 1e-6
    assert products.mixed(7, 4, 3) is None
    assert products.mixed(6, 4, 2) is None


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_the_way_is_the_cheapest_of_all_ways(steps: int) -> None:
    cost = torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(steps))

    def total(way: tuple[int, ...]) -> float:
        return float(cost[0, 0, way[1]] + sum(cost[h, i, j] for h, i, j in zip(way, way[1:], way[2:])))

    ways = [(0, *inner, 5) for inner in itertools.combinations(range(1, 5), steps - 1)]
    assert tuple(shortest_pairs(cost, steps)) == min(ways, key=total)


def test_where_the_jump_before_does_not_matter_it_is_the_plain_way() -> None:
    cost = torch.rand(7, 7, generator=torch.Generator().manual_seed(0))
    for steps in range(1, 7):
        assert shortest_pairs(cost.expand(7, 7, 7), steps) == shortest(cost, steps)
    with pytest.raises(ValueError, match="7 points allow 1 to 6 steps"):
        shortest_pairs(cost.expand(7, 7, 7), 7)
