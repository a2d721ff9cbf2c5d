"""SVDQuant's mathematics: balancing is exact, the branch is the best of its rank, and outliers stop hurting."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hasten.format import NVFP4, Format, dequantize, quantize
from hasten.quant.balance import best, candidates, factors
from hasten.quant.low_rank import largest, split

INT4 = Format("int4", 64)


def layer(outputs: int = 96, inputs: int = 128, rows: int = 160) -> tuple[Tensor, Tensor]:
    """Weights of falling singular values, and activations of which a few channels are 30 times as large."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(outputs, 24, generator=g) @ torch.randn(24, inputs, generator=g) / 8
    w = w + 0.3 * torch.randn(outputs, inputs, generator=g)
    x = torch.randn(rows, inputs, generator=g)
    x[:, ::17] *= 30
    return w, x


def rel(off: float, w: Tensor, x: Tensor) -> float:
    return (off / float((x @ w.T).square().mean())) ** 0.5


def test_balancing_leaves_the_product_and_meets_both_sides_halfway() -> None:
    w, x = layer()
    x[:, 5] = 0
    s = factors(x.abs().amax(0), w.abs().amax(0))
    assert torch.allclose((x / s) @ (w * s).T, x @ w.T, rtol=1e-4, atol=1e-4 * float((x @ w.T).abs().max()))
    seen = torch.arange(128) != 5
    assert torch.allclose((x / s).abs().amax(0)[seen], (w * s).abs().amax(0)[seen], rtol=1e-4)
    assert float(s[5]) == 1
    alone = factors(x.abs().amax(0), w.abs().amax(0), 1.0, 0.0)
    assert torch.allclose((x / alone).abs().amax(0)[seen], torch.ones(127), rtol=1e-4)


def test_of_the_candidates_the_best_is_never_worse_than_none() -> None:
    w, x = layer()

    def error(s: Tensor) -> float:
        return split(w * s, x / s, 16, INT4, INT4, tries=1)[1]

    tried = list(candidates(x.abs().amax(0), w.abs().amax(0), 8))
    assert len(tried) == 15
    assert torch.equal(tried[0], torch.ones(128))
    s, off = best(tried, error)
    assert off == min(map(error, tried)) < 0.5 * error(torch.ones(128))
    assert off == error(s)
    with pytest.raises(ValueError, match="no factors give a finite error"):
        best(tried, lambda s: float("nan"))


def test_the_branch_is_the_nearest_matrix_of_its_rank() -> None:
    w, _ = layer()
    down, up = largest(w, 16)
    assert down.shape == (16, 128)
    assert up.shape == (96, 16)
    left = torch.linalg.svdvals(w.double())[16:]
    assert float((w - up @ down).norm()) == pytest.approx(float(left.norm()), rel=1e-4)


@pytest.mark.parametrize("weights", [INT4, NVFP4], ids=["int4", "nvfp4"])
def test_the_error_falls_with_the_rank_and_a_full_one_is_exact(weights: Format) -> None:
    w, x = layer()
    offs = [rel(split(w, x, rank, weights)[1], w, x) for rank in (0, 8, 32, 64)]
    assert all(a > b for a, b in pairwise(offs)), offs
    assert rel(split(w, x, 96, weights)[1], w, x) < 1e-5
    plain = rel(float((x @ (dequantize(quantize(w, weights)) - w).T).square().mean()), w, x)
    assert offs[0] == pytest.approx(plain, rel=1e-3)


def test_turns_of_branch_and_rest_do_not_end_worse_than_the_first() -> None:
    w, x = layer()
    first, last = split(w, x, 16, INT4, INT4, tries=1), split(w, x, 16, INT4, INT4)
    assert last[1] <= first[1]
    made = last[0]
    off = float((dequantize(quantize(x, INT4)) @ dequantize(made.rest).T + x @ made.down.T @ made.up.T - x @ w.T)
                .square().mean())  # fmt: skip
    assert off == pytest.approx(last[1], rel=1e-3)


def test_on_activations_with_outliers_it_errs_a_third_of_rounding_to_nearest() -> None:
    """Four bits of both, rank 32: balanced factors and the branch together."""
    w, x = layer()
    nearest = split(w, x, 0, INT4, INT4)[1]
    s, _ = best(candidates(x.abs().amax(0), w.abs().amax(0), 10), lambda s: split(w * s, x / s, 32, INT4, INT4, 1)[1])
    ours = split(w * s, x / s, 32, INT4, INT4)[1]
    assert rel(ours, w, x) < rel(nearest, w, x) / 3
