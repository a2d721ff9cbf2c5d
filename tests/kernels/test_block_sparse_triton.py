"""The Triton kernel of block-sparse attention: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from test_block_sparse import SHAPES, case
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from hasten.kernels.block_sparse import reference

pytest.importorskip("triton")
from hasten.kernels.block_sparse_triton import block_attention_triton, with_logsumexp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given(name: str, heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, index = (x.to(DEVICE) for x in case(name, heads=heads))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), index


@pytest.mark.system("sparse-attention", "flashattention-2")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_values_and_gradients_are_those_of_the_masked_reference(name: str, biased: bool) -> None:
    q, k, v, index = given(name)
    tail, block = SHAPES[name][2:4]
    bias = torch.randn(2, k.shape[2], generator=torch.Generator().manual_seed(1)).to(DEVICE) if biased else None
    got, want = block_attention_triton(q, k, v, index, block, tail, bias), reference(q, k, v, index, block, tail, bias)
    assert (got - want).abs().max() < 2e-6
    weight = torch.arange(16, device=DEVICE)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < 2e-6 * theirs.abs().max()


@pytest.mark.system("flashattention-2")
def test_it_tells_the_logarithm_of_the_sum_of_exponentials() -> None:
    q, k, v, _ = given("ragged")
    every = torch.arange(5, device=DEVICE).expand(2, 2, 3, -1)
    out, lse = with_logsumexp(q, k, v, every, (64, 32))
    want = (q.double() @ k.double().transpose(2, 3) / 4).logsumexp(-1)
    assert (lse - want).abs().max() < 2e-6
    assert (out - attend(q, k, v)).abs().max() < 2e-6


def test_blocks_and_channels_need_be_no_powers_of_two() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 60, 20, generator=rng).to(DEVICE) for _ in range(3))
    index = torch.tensor([[0, 3], [2, 1]], device=DEVICE)[None, None].expand(1, 2, -1, -1)
    got = block_attention_triton(q, k, v, index, (30, 15))
    assert (got - reference(q, k, v, index, (30, 15))).abs().max() < 2e-6


def test_a_key_that_all_is_hidden_from_in_a_block_leaves_no_nan() -> None:
    q, k, v, _ = given("even", heads=1)
    bias = torch.zeros(1, 256, device=DEVICE)
    bias[:, :64] = -torch.inf  # whole blocks
    first = torch.arange(3, device=DEVICE).expand(2, 1, 4, -1)
    got = block_attention_triton(q, k, v, first, (64, 32), 0, bias)
    assert (got - reference(q, k, v, first, (64, 32), 0, bias)).abs().max() < 2e-6
