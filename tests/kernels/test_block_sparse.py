"""Attention to chosen blocks, against dense attention in float64 under the same mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.flop_counter import FlopCounterMode

from hasten.kernels import block_sparse
from hasten.kernels.block_sparse import block_attention, reference, seen_keys

SHAPES = {  # queries, places, tail, block, chosen
    "even": (256, 256, 0, (64, 32), 3),
    "ragged": (150, 141, 0, (64, 32), 2),
    "words": (150, 141, 7, (64, 32), 2),
    "words alone": (64, 64, 40, (64, 32), 0),
    "one block": (30, 20, 0, (64, 32), 1),
}


def case(name: str, dtype: torch.dtype = torch.float32, heads: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and an index of another choice for each row, head and block."""
    queries, places, tail, block, chosen = SHAPES[name]
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, generator=rng, dtype=dtype) for n in (queries, *[places + tail] * 2))
    blocks = -(-queries // block[0]), -(-places // block[1])
    return q, k, v, torch.rand(2, heads, *blocks, generator=rng).argsort(-1)[..., :chosen]


@pytest.mark.system("sparse-attention")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_dense_attention_under_a_mask(name: str, dtype: torch.dtype) -> None:
    q, k, v, index = case(name, dtype)
    tail, block = SHAPES[name][2:4]
    got = block_attention(q, k, v, index, block, tail)
    want = reference(q, k, v, index, block, tail)
    assert got.dtype == dtype
    exact = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert (got.double() - want).abs().max() < exact


@pytest.mark.system("sparse-attention")
def test_all_blocks_are_dense_attention() -> None:
    q, k, v, index = case("even", torch.float64)
    every = torch.arange(8).expand(*index.shape[:3], -1)
    torch.testing.assert_close(block_attention(q, k, v, every, (64, 32)), attend(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ragged", "words", "even"])
def test_a_bias_of_keys_hides_and_weighs_them(name: str) -> None:
    q, k, v, index = case(name, torch.float64)
    tail, block = SHAPES[name][2:4]
    rng = torch.Generator().manual_seed(1)
    bias = torch.randn(2, k.shape[2], generator=rng).masked_fill(torch.rand(2, k.shape[2], generator=rng) < 0.3, -1e9)
    got = block_attention(q, k, v, index, block, tail, bias)
    torch.testing.assert_close(got, reference(q, k, v, index, block, tail, bias), rtol=0, atol=1e-12)
    assert not torch.allclose(got, block_attention(q, k, v, index, block, tail))


@pytest.mark.parametrize("name", ["ragged", "words"])
def test_gradients_are_those_of_the_masked_reference(name: str) -> None:
    q, k, v, index = case(name, torch.float64, heads=1)
    tail, block = SHAPES[name][2:4]
    out: list[tuple[Tensor, ...]] = []
    for attention in (block_attention, reference):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention(*given, index, block, tail)
        out.append(torch.autograd.grad((y * torch.arange(16)).sum(), given))
    for got, want in zip(*out, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_one_index_may_serve_all_heads_and_rows() -> None:
    q, k, v, index = case("even")
    shared = index[:1, :1]
    assert torch.equal(
        block_attention(q, k, v, shared, (64, 32)), block_attention(q, k, v, shared.expand(2, 3, -1, -1), (64, 32))
    )


@pytest.mark.system("sparse-attention")
@pytest.mark.parametrize("work", [1, 1 << 12, 1 << 30])
def test_work_falls_with_the_blocks_whatever_is_packed_at_once(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "WORK", work)
    q, k, v, index = case("even")
    with FlopCounterMode(display=False) as counter:
        got = block_attention(q, k, v, index, (64, 32))
    assert counter.get_total_flops() == 2 * 2 * q.numel() * 32 * 3  # q k^T and p v, over 3 blocks of 32 keys
    assert (got - reference(q, k, v, index, (64, 32))).abs().max() < 2e-6


def test_what_a_query_reads_as_a_mask() -> None:
    index = torch.tensor([[[[1], [0]]]])
    assert seen_keys(index, 3, 5, (2, 2), tail=1)[0, 0].int().tolist() == [[0, 0, 1, 1, 1]] * 2 + [[1, 1, 0, 0, 1]]


def test_an_index_of_other_blocks_is_refused() -> None:
    q, k, v, index = case("even")
    with pytest.raises(ValueError, match="4 blocks of queries may each choose among 8 of keys"):
        block_attention(q, k, v, index[:, :, :3], (64, 32))
