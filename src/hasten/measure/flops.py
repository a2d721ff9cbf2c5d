"""Floating-point operations of a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, int, int, int]

_ON_CPU = ("_scaled_dot_product_flash_attention_for_cpu",)  # torch's counter knows the CUDA kernels alone


def count(call: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention in one run of `call`; a multiply-add is 2.

    What torch's dispatcher shows it, by shape: a product of [m, k] and [k, n] is 2 m k n. Not seen, and so not counted:
    elementwise work, integer products (`torch._int_mm`, int8), custom kernels (Triton, C++), and products inside code
    that `torch.compile` has fused into its own kernels. Count a recipe before it is compiled; of a quantized network
    the number is a lower bound.
    """
    unknown = {op: _attention for name in _ON_CPU if (op := getattr(torch.ops.aten, name, None)) is not None}
    with warnings.catch_warnings(), FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        warnings.filterwarnings("ignore", message=".*global hooks on modules", category=UserWarning)  # the counter's
        call()
    return int(counter.get_total_flops())


def _attention(q: Shape, k: Shape, v: Shape, *_: object, **__: object) -> int:
    """Scores of q [B, H, L, E] and k [B, H, S, E], then their product with v [B, H, S, F]: 2 B H L S (E + F)."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])
