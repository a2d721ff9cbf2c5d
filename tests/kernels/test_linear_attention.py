"""Linear attention, against the square matrix that it does not form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hasten.kernels import linear_attention as kernel
from hasten.kernels.linear_attention import LEAST, feature_map, linear_attention, marginal_attention

pytestmark = pytest.mark.system("linear-attention")


def given(n: int = 30, m: int = 26, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, size, 8, generator=rng, dtype=torch.float64) for size in (n, m, m))


def square(q: Tensor, k: Tensor, v: Tensor, read: Tensor | float = 1.0) -> Tensor:
    """By the matrix of weights, [.., N, M]."""
    weights = q @ k.transpose(2, 3) * read
    return weights @ v / (weights.sum(-1, keepdim=True) + LEAST)


@pytest.mark.parametrize("name", ["softmax", "elu", "relu"])
def test_the_order_of_products_does_not_matter(name: str) -> None:
    q, k, v = given()
    phi = feature_map(name)
    assert (phi(q) >= 0).all()
    torch.testing.assert_close(linear_attention(phi(q), phi(k), v), square(phi(q), phi(k), v), rtol=0, atol=1e-12)


def test_the_maps_are_what_their_names_say() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.equal(feature_map("relu")(x), torch.tensor([0.0, 0.0, 2.0]))
    torch.testing.assert_close(feature_map("elu")(x), torch.tensor([torch.e**-1, 1.0, 3.0]))
    torch.testing.assert_close(feature_map("softmax")(x), x.exp() / x.exp().sum())
    with pytest.raises(ValueError, match="unknown feature map 'cosine'; known: softmax, elu, relu"):
        feature_map("cosine")


def test_a_bias_counts_a_key_so_many_times_and_hides_it() -> None:
    q, k, v = (feature_map("elu")(x) for x in given())
    bias = torch.zeros(2, 26).double()
    bias[:, 3], bias[0, 5:9] = torch.log(torch.tensor(3.0)), -torch.inf
    want = square(q, k, v, bias.exp()[:, None, None])
    torch.testing.assert_close(linear_attention(q, k, v, bias), want, rtol=0, atol=1e-12)


@pytest.mark.system("sla")
@pytest.mark.parametrize("held", [1, 1 << 26])
def test_blocks_that_are_read_are_those_of_the_square_matrix(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged last blocks, and one row of blocks that reads nothing, which gives zero."""
    monkeypatch.setattr(kernel, "SUMS", held)
    q, k, v = given()
    phi = feature_map("softmax")
    read = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    read[:, :, 2] = False
    wide = read.repeat_interleave(4, 2).repeat_interleave(5, 3)[:, :, :30, :26].double()
    got = marginal_attention(phi(q), phi(k), v, read, (4, 5))
    torch.testing.assert_close(got, square(phi(q), phi(k), v, wide), rtol=0, atol=1e-12)
    assert not got[:, :, 8:12].any()


def test_work_grows_with_the_tokens_and_not_their_square() -> None:
    flops = []
    for n in (64, 128, 256):
        q, k, v = given(n, n)
        with FlopCounterMode(display=False) as counter:
            linear_attention(q, k, v)
        flops.append(counter.get_total_flops())
    assert flops == [flops[0], 2 * flops[0], 4 * flops[0]]
