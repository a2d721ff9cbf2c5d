"""Places and words that attend together, whatever the attention among the places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from hasten.attention.words import among_places, ordered
from hasten.kernels.block_sparse import packed_attention
from hasten.method import Refused
from hasten.picture import Call

N, WORDS = 24, 5


def dense(q: Tensor, k: Tensor, v: Tensor, tail: int, bias: Tensor | None) -> Tensor:
    return attend(q, k, v, None if bias is None else bias[:, None, None].to(q.dtype))


def call(before: int, after: int, shared: int = 4, **more: Tensor | bool | None) -> Call:
    rng = torch.Generator().manual_seed(0)
    length = before + N + after
    q, k, v = (torch.randn(2, h, length, 8, generator=rng, dtype=torch.float64) for h in (4, shared, shared))
    gqa = {"enable_gqa": True} if shared != 4 else {}
    return Call(q, k, v, slice(before, before + N), more=gqa, **more)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (WORDS, 0), (0, WORDS), (2, 3)])
@pytest.mark.parametrize("shared", [4, 2], ids=["all heads", "shared keys"])
@pytest.mark.parametrize("mask", ["none", "hides", "adds"])
def test_with_dense_attention_among_the_places_nothing_changes(before: int, after: int, shared: int, mask: str) -> None:
    length = before + N + after
    seen = torch.rand(2, 1, 1, length, generator=torch.Generator().manual_seed(1)) > 0.3
    masks = {"none": None, "hides": seen, "adds": torch.randn(1, 1, 1, length).double()}
    this = call(before, after, shared, mask=masks[mask])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    for way in (dense, ordered(dense, order)):
        torch.testing.assert_close(among_places(this, way), this.run(), rtol=0, atol=1e-6 if mask == "adds" else 1e-12)


@pytest.mark.system("sparse-attention")
@pytest.mark.parametrize(("before", "after"), [(WORDS, 0), (0, WORDS), (0, 0)])
def test_words_are_read_by_all_and_read_all(before: int, after: int) -> None:
    """And places, in another order, read their blocks alone: as a mask in the first order says it."""
    this, order = call(before, after), torch.randperm(N, generator=torch.Generator().manual_seed(3))
    index = torch.rand(2, 4, 4, 6, generator=torch.Generator().manual_seed(4)).argsort(-1)[..., :2]

    def sparse(q: Tensor, k: Tensor, v: Tensor, tail: int, bias: Tensor | None) -> Tensor:
        return packed_attention(q, k, v, index, (6, 4), tail, bias)

    chosen = torch.zeros(2, 4, 4, 6, dtype=torch.bool).scatter(-1, index, True)
    seen = torch.ones(2, 4, before + N + after, before + N + after, dtype=torch.bool)
    at = order.argsort()  # where in the new order a place stands
    seen[:, :, this.at, this.at] = chosen[:, :, at // 6][..., at // 4]
    want = attend(this.query, this.key, this.value, seen)
    torch.testing.assert_close(among_places(this, ordered(sparse, order)), want, rtol=0, atol=1e-12)


def test_a_mask_that_differs_between_queries_is_refused() -> None:
    with pytest.raises(Refused, match="tells other keys to other queries"):
        among_places(call(0, 0, mask=torch.ones(N, N, dtype=torch.bool)), dense)
    with pytest.raises(Refused, match="causal"):
        among_places(call(0, 0, causal=True), dense)
