"""Attention written out against torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hasten.tokens.joint import explicit


def test_attention_by_its_definition_is_torchs_forward_and_backward() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 1, 1, 11, generator=rng, dtype=torch.float64)
    grads = []
    for attend in (explicit, F.scaled_dot_product_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, attn_mask=bias)
        grads.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for ours, torchs in zip(*grads, strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-5, atol=1e-6)
