"""Increments of one Brownian motion: their law, their refinement, and what they are keyed by."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from hasten.brownian import SKELETON, Brownian

CLOCKS = [0.0, 1e-4, 0.02, 0.3, 1.0, 1.5, 9.0, 130.0, 2e4]


def like(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("skeleton", [0, SKELETON])
@pytest.mark.parametrize("order", ["forwards", "backwards", "mixed"])
def test_increments_over_disjoint_intervals_are_standard_normal_and_independent(order: str, skeleton: int) -> None:
    """In whatever order they are asked for, with coarse intervals asked in between: all moments to the fourth, and all
    covariances, within five standard errors."""
    size, noise = 60_000, Brownian([11], skeleton)
    spans = list(itertools.pairwise(CLOCKS))
    asked = {"forwards": spans, "backwards": spans[::-1], "mixed": random.Random(4).sample(spans, len(spans))}[order]
    found = {}
    for i, span in enumerate(asked):
        noise(CLOCKS[i // 2], CLOCKS[-1 - i // 3], like(size))  # a coarse one, which overlaps
        found[span] = noise(*span, like(size))
    z = torch.stack([found[s] for s in spans])
    spread = 5 / math.sqrt(size)
    assert z.mean(1).abs().max() < spread
    assert (z @ z.T / size - torch.eye(len(spans))).abs().max() < spread * math.sqrt(2)
    assert (z**3).mean(1).abs().max() < spread * math.sqrt(15)
    assert ((z**4).mean(1) - 3).abs().max() < spread * math.sqrt(96)


def test_a_finer_grid_refines_the_same_path_exactly() -> None:
    """Parts add up to the whole, whether the whole or its parts were asked for first."""
    for order in itertools.permutations([(0.2, 3.0), (0.2, 0.9), (0.9, 3.0)]):
        noise = Brownian([3])
        w = {(a, b): noise(a, b, like(50)) * math.sqrt(b - a) for a, b in order}
        assert (w[0.2, 0.9] + w[0.9, 3.0] - w[0.2, 3.0]).abs().max() < 1e-14


def test_asked_again_it_says_the_same_in_either_direction() -> None:
    noise = Brownian([3])
    once = noise(0.5, 2.0, like(20))
    noise(0.7, 1.1, like(20))
    assert torch.equal(noise(0.5, 2.0, like(20)), once)
    assert torch.equal(noise(2.0, 0.5, like(20)), once)
    assert torch.equal(Brownian([3])(0.5, 2.0, like(20)), once)
    assert not torch.equal(Brownian([4])(0.5, 2.0, like(20)), once)


def steps(seed: int, count: int, skeleton: int) -> Tensor:
    """W at clock 40 as a run of `count` even steps in log clock sees it, from 0.01 on."""
    noise = Brownian([seed], skeleton)
    spans = itertools.pairwise([0.01 * 4000 ** (i / count) for i in range(count + 1)])
    return torch.stack([noise(a, b, like(4000)) * math.sqrt(b - a) for a, b in spans]).sum(0)


def test_runs_of_other_step_counts_with_one_seed_see_nearly_the_same_path() -> None:
    """The skeleton does it, whose few draws a run are all that it costs: without one they agree in the last alone."""

    def alike(a: Tensor, b: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a, b]))[0, 1])

    ten, bare = steps(8, 10, SKELETON), steps(8, 10, 0)
    for count in (3, 7, 13, 30):
        assert alike(steps(8, count, SKELETON), ten) > 0.97
        assert alike(steps(8, count, 0), bare) < 0.9
    assert abs(alike(steps(9, 10, SKELETON), ten)) < 0.1


def test_rows_with_seeds_of_their_own_are_what_they_are_alone() -> None:
    """A picture does not depend on its neighbours in the batch."""
    together = Brownian([5, 6, 7])(0.1, 2.0, like(3, 4, 2))
    for row, seed in zip(together, [5, 6, 7], strict=True):
        assert torch.equal(row, Brownian([seed])(0.1, 2.0, like(1, 4, 2))[0])


def test_rounding_in_the_arithmetic_of_a_clock_does_not_change_the_numbers() -> None:
    """Two solvers that compute one reading in two ways get the same noise; readings closer than that still differ."""
    one = Brownian([3])(0.1, 2.89, like(20))
    assert torch.equal(Brownian([3])(0.1, math.nextafter(2.89, 3.0), like(20)), one)
    near = Brownian([3])(1.0, 1.0 + 1e-13, like(4000))
    assert abs(float(near.std()) - 1) < 0.1


def test_generators_seed_it() -> None:
    def made(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    one = Brownian.of(made(1))(0.0, 1.0, like(2, 3))
    assert torch.equal(one, Brownian.of(made(1))(0.0, 1.0, like(2, 3)))
    assert not torch.equal(one, Brownian.of(made(2))(0.0, 1.0, like(2, 3)))
    rows = Brownian.of([made(1), made(2)])(0.0, 1.0, like(2, 3))
    assert torch.equal(rows[1:], Brownian.of(made(2))(0.0, 1.0, like(1, 3)))
    rng = made(1)
    first, second = Brownian.of(rng), Brownian.of(rng)  # each takes a draw: two pictures of one generator differ
    assert first.seeds != second.seeds
    assert len(Brownian.of(None).seeds) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_increments_have_the_dtype_of_the_state_and_are_as_exact_as_it_allows(dtype: torch.dtype) -> None:
    """Late on the clock an increment is a small difference of large W: it is rounded after the difference, not before,
    so a half-precision state gets the noise of a float32 one, rounded."""
    span = (1e4, 1.01e4)
    got = Brownian([2])(*span, like(500, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert got.dtype == dtype
    assert torch.equal(got, Brownian([2])(*span, like(500, dtype=wide)).to(dtype))


def test_increments_are_on_the_device_of_the_state() -> None:
    assert Brownian([2])(1.0, 2.0, torch.zeros(3, device="meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_numbers_do_not_depend_on_the_device() -> None:
    near, far = like(64, dtype=torch.float32), torch.zeros(64, device="cuda")
    assert (Brownian([2])(0.5, 2.0, far).cpu() - Brownian([2])(0.5, 2.0, near)).abs().max() < 1e-6


@pytest.mark.parametrize("span", [(1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, math.inf), (math.nan, 1.0), (0.0, 0.0)])
def test_readings_without_an_increment_are_refused(span: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="between two finite readings from 0 up, got"):
        Brownian([1])(*span, like(2))
