"""Shorter queries and keys inside a running attention, against dense matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hasten.method import Refused
from hasten.tokens.matching import destinations, match
from hasten.tokens.within import Side, Within

N, WORDS, HEADS, BATCH = 24, 5, 3, 2


def tensors() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, HEADS, n, 4, generator=rng, dtype=torch.float64) for n in (N, N, N, WORDS, WORDS, WORDS)]


def side(seed: int, r: int) -> tuple[Side, torch.Tensor, torch.Tensor]:
    """Tokens that go are dropped; with the matrices that say the same, [B, H, M, N] and [B, H, N, M]."""
    x = torch.randn(BATCH * HEADS, N, 4, generator=torch.Generator().manual_seed(seed))
    pairs = match(x, destinations((4, 6), (2, 2), torch.Generator().manual_seed(seed)), r)

    def of(change):
        return lambda y: change(y.flatten(0, 1)).unflatten(0, (BATCH, HEADS))

    down = torch.zeros(BATCH * HEADS, N - r, N, dtype=torch.float64).scatter_(2, pairs.stay_BM[..., None], 1)
    up = torch.zeros(BATCH * HEADS, N, N - r, dtype=torch.float64).scatter_(2, pairs.back_BN[..., None], 1)
    stay = pairs.stay_BM.unflatten(0, (BATCH, HEADS))
    return Side(of(pairs.pick), of(pairs.unmerge), stay), *(m.unflatten(0, (BATCH, HEADS)) for m in (down, up))


def masks() -> dict[str, torch.Tensor | None]:
    rng = torch.Generator().manual_seed(1)
    keys = torch.rand(BATCH, 1, 1, N + WORDS, generator=rng) > 0.3
    return {
        "none": None, "keys": keys, "bias": torch.randn(1, HEADS, N + WORDS, N + WORDS, generator=rng).double(),
        "square": torch.rand(N + WORDS, N + WORDS, generator=rng) > 0.3,
    }  # fmt: skip


@pytest.mark.system("asymrnr")
@pytest.mark.parametrize("mask", ["none", "keys", "bias", "square"])
@pytest.mark.parametrize("first", ["words", "picture", "alone"])
@pytest.mark.parametrize("which", ["queries", "keys", "both"])
def test_attention_on_shorter_sequences_equals_matrices_around_the_whole(first: str, which: str, mask: str) -> None:
    parts, bias = tensors(), masks()[mask]
    if first == "alone":
        q, k, v = parts[:3]
        before, after = 0, 0
        bias = None if bias is None else bias[..., : bias.shape[-2] if bias.shape[-2] == 1 else N, :N]
    else:
        before, after = (WORDS, 0) if first == "words" else (0, WORDS)
    queries, down_q, up_q = side(1, 9)
    keys, down_k, _ = side(2, 6)
    plan = (queries if which != "keys" else None, keys if which != "queries" else None)

    def whole(matrix: torch.Tensor) -> torch.Tensor:
        eye = [torch.eye(n, dtype=torch.float64).expand(BATCH, HEADS, n, n) for n in (before, after)]
        m, n = matrix.shape[-2:]
        out = torch.zeros(BATCH, HEADS, before + m + after, before + n + after, dtype=torch.float64)
        out[..., :before, :before], out[..., before + m :, before + n :] = eye
        out[..., before : before + m, before : before + n] = matrix
        return out

    with Within(N) as mode, mode.on(lambda *_: plan):
        if first != "alone":
            order = (3, 0) if first == "words" else (0, 3)
            q, k, v = (torch.cat([parts[i + j] for j in order], 2) for i in range(3))
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert mode.met == 1
    same = torch.eye(N, dtype=torch.float64).expand(BATCH, HEADS, N, N)
    down_q, up_q = (whole(m if plan[0] else same) for m in (down_q, up_q))
    down_k = whole(down_k if plan[1] else same)
    logits = (down_q @ q) @ (down_k @ k).transpose(-1, -2) / 2
    if bias is not None:
        added = bias.double() if bias.is_floating_point() else torch.where(bias, 0.0, -torch.inf).double()
        added = added.expand(BATCH, HEADS, q.shape[-2], q.shape[-2]).nan_to_num(neginf=-1e9)
        logits = logits + down_q @ added @ down_k.transpose(-1, -2)
    want = up_q @ logits.softmax(-1) @ (down_k @ v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_attention_to_words_and_attention_outside_stay_as_they_are() -> None:
    q, k, v, _, c, _ = tensors()
    with Within(N) as mode:
        plain = F.scaled_dot_product_attention(q, k, v)
        with pytest.raises(Refused, match="was seen to run"), mode.on(lambda *_: pytest.fail("these are words")):
            assert torch.equal(F.scaled_dot_product_attention(q, c, c), F.scaled_dot_product_attention(q, c, c))
    assert torch.equal(plain, F.scaled_dot_product_attention(q, k, v))


def test_as_many_words_as_places_are_refused() -> None:
    with Within(N) as mode:
        q, k, v = (torch.cat([x, x], 2) for x in tensors()[:3])
        with pytest.raises(Refused, match="as many words"), mode.on(lambda *_: (None, None)):
            F.scaled_dot_product_attention(q, k, v)


def test_heads_that_share_keys_are_refused() -> None:
    q, k, v = tensors()[:3]
    with Within(N) as mode, pytest.raises(Refused, match="share keys"), mode.on(lambda *_: (None, None)):
        F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
