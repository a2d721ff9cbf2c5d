"""Joint attention of two streams with a bias on the keys, in the form diffusers calls a processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class BiasedJointAttention:
    """What SD3's processor computes, plus `attention_mask` [1, 1, 1, N + M] added to the logits of the N + M keys.

    Esser et al. 2024, arXiv:2403.03206 section 4: image and text tokens have their own projections and attend together.

    Attributes:
        attend: (q, k, v, attn_mask) -> y, all [B, heads, N + M, C]; `explicit` trains faster on CPU.
    """

    def __init__(self, attend: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        self.attend = attend

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:  # fmt: skip
        x_BNC, c_BMC = hidden_states, encoder_hidden_states

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def norm(layer: Any, y: Tensor) -> Tensor:
            return y if layer is None else layer(y)

        q = norm(attn.norm_q, heads(attn.to_q(x_BNC)))
        k = norm(attn.norm_k, heads(attn.to_k(x_BNC)))
        v = heads(attn.to_v(x_BNC))
        if c_BMC is not None:
            q = torch.cat([q, norm(attn.norm_added_q, heads(attn.add_q_proj(c_BMC)))], 2)
            k = torch.cat([k, norm(attn.norm_added_k, heads(attn.add_k_proj(c_BMC)))], 2)
            v = torch.cat([v, heads(attn.add_v_proj(c_BMC))], 2)
        bias = None if attention_mask is None else attention_mask.to(q.dtype)
        y = self.attend(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        if c_BMC is None:
            return attn.to_out[1](attn.to_out[0](y))
        y, c = y.split([x_BNC.shape[1], c_BMC.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](y)), c if attn.context_pre_only else attn.to_add_out(c)


def explicit(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Attention by its definition, logits in float32. At a hundred tokens its backward pass is faster than that of
    torch's CPU flash attention."""
    logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1).to(v.dtype) @ v
