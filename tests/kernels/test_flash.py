"""Attention in tiles, against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.kernels.flash import tiled_attention


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, n, 16, generator=rng).to(dtype).requires_grad_() for n in (37, 53, 53))


def masks() -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(1)
    return {
        "none": None, "keys": torch.rand(2, 1, 1, 53, generator=rng) > 0.3,
        "square": torch.rand(37, 53, generator=rng) > 0.5, "added": 3 * torch.randn(1, 3, 37, 53, generator=rng),
    }  # fmt: skip


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    s = q.double() @ k.double().transpose(2, 3) / 4
    if mask is not None:
        s = s + mask.double() if mask.is_floating_point() else s.masked_fill(~mask, -torch.inf)
    return s.softmax(-1) @ v.double(), s.logsumexp(-1)


@pytest.mark.system("flashattention", "flashattention-2")
@pytest.mark.parametrize("mask", ["none", "keys", "square", "added"])
@pytest.mark.parametrize("tile", [8, 16, 64])
def test_values_sums_and_gradients_are_those_of_the_definition(mask: str, tile: int) -> None:
    q, k, v = given()
    got, lse = tiled_attention(q, k, v, masks()[mask], tile)
    want, sums = plain(q, k, v, masks()[mask])
    assert (got - want).abs().max() < 1e-6
    assert (lse - sums).abs().max() < 2e-6
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.system("flashattention")
def test_gradients_pass_the_check_by_finite_differences() -> None:
    q, k, v = (x.detach()[:1, :1, :5, :3].double().requires_grad_() for x in given())
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, tile=2)[0], (q, k, v))


@pytest.mark.system("flashattention")
def test_large_logits_do_not_overflow_and_halves_are_summed_wide() -> None:
    q, k, v = given()
    got, lse = tiled_attention(60 * q, 60 * k, v, tile=8)
    want, sums = plain(60 * q, 60 * k, v, None)
    assert (got - want).abs().max() < 1e-3  # logits of thousands keep three digits behind the point
    assert torch.allclose(lse.double(), sums)
    half = [x.bfloat16() for x in (q, k, v)]
    assert (tiled_attention(*half, tile=8)[0] - plain(*half, None)[0]).abs().max() < 1e-2


def test_a_query_that_sees_no_key_gives_zero_and_no_gradient() -> None:
    q, k, v = given()
    seen = torch.ones(37, 53, dtype=torch.bool)
    seen[5] = False
    out, lse = tiled_attention(q, k, v, seen, 16)
    assert not out[:, :, 5].any()
    assert (lse[:, :, 5] == -math.inf).all()
    dq, dk, _ = torch.autograd.grad(out.sum(), (q, k, v))
    assert not dq[:, :, 5].any()
    assert dk.isfinite().all()


@pytest.mark.system("flashattention")
def test_memory_grows_with_the_tokens_and_not_their_square() -> None:
    """What is kept for the way back, and the largest tensor that is formed on the way."""
    largest = []
    for n in (128, 256, 512):
        x = torch.randn(1, 1, n, 8, requires_grad=True)

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            most = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                out = func(*args, **(kwargs or {}))
                sizes = [t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
                self.most = max([self.most, *sizes])
                return out

        with Watch() as watch:
            tiled_attention(x, x, x, tile=32)[0].sum().backward()
        largest.append(watch.most)
    assert largest == [largest[0], 2 * largest[0], 4 * largest[0]]
