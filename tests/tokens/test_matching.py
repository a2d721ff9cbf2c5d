"""Bipartite soft matching, against loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hasten.tokens import matching
from hasten.tokens.matching import destinations, match, redundancy, take

GRIDS = [
    ((4, 6), (2, 2)),
    ((5, 7), (2, 2)),
    ((1, 9), (3, 2)),
    ((3, 3), (5, 5)),
    ((3, 4, 5), (2, 2, 2)),
    ((2, 3, 7), (1, 2, 3)),
]


def metric(batch: int, tokens: int, width: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_every_whole_window_holds_one_destination_and_the_rest_of_the_grid_none(grid, window, seed) -> None:
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    found = set(destinations(grid, window, rng).tolist())
    window = [min(w, g) for w, g in zip(window, grid)]
    counts = [g // w for w, g in zip(window, grid)]
    held = 0
    for corner in itertools.product(*(range(c) for c in counts)):
        places = [
            sum((c * w + o) * math.prod(grid[d + 1 :]) for d, (c, w, o) in enumerate(zip(corner, window, offset)))
            for offset in itertools.product(*(range(w) for w in window))
        ]
        here = [p for p in places if p in found]
        assert len(here) == 1
        assert seed is not None or here == places[:1]
        held += 1
    assert len(found) == held == math.prod(counts)


def test_destinations_are_uniform_over_their_window() -> None:
    rng = torch.Generator().manual_seed(0)
    draws = torch.stack([destinations((2, 3), (2, 3), rng) for _ in range(6000)]).flatten()
    share = torch.bincount(draws, minlength=6) / 6000
    assert (share - 1 / 6).abs().max() < 4 * math.sqrt(1 / 6 * 5 / 6 / 6000)


def test_a_grid_and_a_window_of_other_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 4\) and \(2,\)"):
        destinations((4, 4), (2,))
    with pytest.raises(ValueError, match="1 or more"):
        destinations((4, 0), (2, 2))


def slow(x: torch.Tensor, into: list[int], r: int, likeness: str) -> list[dict[int, int]]:
    """Of each row: which token stands for which, by loops over all pairs in float64."""
    found = []
    for row in x.double():
        best = {}
        for i in range(len(row)):
            if i in into:
                continue
            scores = []
            for j in into:
                a, b = row[i], row[j]
                cosine = (a @ b) / (a.norm() * b.norm())
                scores.append(float(cosine if likeness == "cosine" else -(a - b).square().sum()))
            top = max(range(len(into)), key=lambda j: scores[j])
            best[i] = (scores[top], into[top])
        gone = sorted(best, key=lambda i: -best[i][0])[:r]
        found.append({i: best[i][1] if i in gone else i for i in range(len(row))})
    return found


@pytest.mark.system("tome-sd")
@pytest.mark.parametrize("likeness", ["cosine", "euclidean"])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_matching_merging_and_copying_back_equal_loops(grid, window, share, likeness, monkeypatch) -> None:
    monkeypatch.setattr(matching, "AT_ONCE", 7)  # in many small parts, as where memory is short
    n = math.prod(grid)
    x, y = metric(3, n), metric(3, n, 4, seed=9)
    into = destinations(grid, window, torch.Generator().manual_seed(3))
    r = int(n * share)
    pairs = match(x, into, r, likeness)
    want = slow(x, into.tolist(), r, likeness)
    gone = min(r, n - len(into))
    assert pairs.stay_BM.shape == (3, n - gone)
    merged, picked = pairs.merge(y), pairs.pick(y)
    back, again = pairs.unmerge(merged), pairs.unmerge(picked)
    for b, stands in enumerate(want):
        assert sorted(set(stands.values())) == sorted(pairs.stay_BM[b].tolist())
        for i, j in stands.items():
            alike = torch.stack([y[b, k] for k in stands if stands[k] == j])
            torch.testing.assert_close(back[b, i], alike.mean(0), rtol=1e-6, atol=1e-6)
            assert torch.equal(again[b, i], y[b, j])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75])
def test_merging_and_copying_back_twice_is_once(share) -> None:
    y = metric(2, 48, 3)
    pairs = match(y, destinations((6, 8), (2, 2), torch.Generator().manual_seed(0)), int(48 * share))
    once = pairs.unmerge(pairs.merge(y))
    torch.testing.assert_close(pairs.unmerge(pairs.merge(once)), once, rtol=0, atol=1e-6)
    torch.testing.assert_close(pairs.merge(pairs.unmerge(pairs.merge(y))), pairs.merge(y), rtol=0, atol=1e-6)
    exact = pairs.unmerge(pairs.pick(y))
    assert torch.equal(pairs.unmerge(pairs.pick(exact)), exact)


def test_no_token_fewer_is_the_identity_bit_for_bit() -> None:
    y = metric(2, 35, 3)
    pairs = match(y, destinations((5, 7), (2, 2)), 0)
    assert torch.equal(pairs.unmerge(pairs.merge(y)), y)
    assert torch.equal(pairs.unmerge(pairs.pick(y)), y)


def test_no_more_go_than_are_no_destinations() -> None:
    x = metric(2, 35)
    into = destinations((5, 7), (2, 2))
    pairs = match(x, into, 34)
    assert sorted(pairs.stay_BM[0].tolist()) == sorted(into.tolist())


def test_a_mean_of_many_in_bfloat16_is_a_mean() -> None:
    """A thousand tokens into one: neither their sum nor their number fits that format."""
    y = (1 + metric(1, 1024, 2) / 8).bfloat16()
    pairs = match(y.float(), torch.tensor([0]), 1023)
    torch.testing.assert_close(pairs.merge(y)[0, 0].float(), y.float().mean(1)[0], rtol=4e-3, atol=0)


def test_half_precision_finds_the_nearest_and_takes_tokens_of_zeros() -> None:
    """Far from the origin, where squares of bfloat16 differ by more than distances."""
    x = torch.tensor([[[64.0, 64.5], [65.0, 64.0], [64.0, 64.5], [65.0, 64.0], [0.0, 0.0]]]).bfloat16()
    pairs = match(x, torch.tensor([0, 1]), 3, "euclidean")
    assert torch.equal(pairs.unmerge(pairs.pick(x))[:, :4], x[:, :4])
    assert match(x.half(), torch.tensor([0, 1]), 3).merge(x.half()).isfinite().all()


def test_redundancy_is_one_of_equal_tokens_and_zero_of_orthogonal_ones() -> None:
    into = torch.tensor([0])
    alike = torch.ones(1, 2, 3)
    assert redundancy(alike, match(alike, into, 1, "euclidean")) == 1
    apart = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    assert redundancy(apart, match(apart, into, 1, "euclidean")) == 0
    both = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    assert redundancy(both, match(both, into, 2, "euclidean")) == 0.5


def test_taking_equals_indexing_row_by_row() -> None:
    y, index = metric(3, 10), torch.tensor([[1, 1], [9, 0], [4, 5]])
    assert torch.equal(
        take(y.transpose(1, 2).contiguous().transpose(1, 2), index), torch.stack([y[b, index[b]] for b in range(3)])
    )
