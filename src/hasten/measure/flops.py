"""Floating-point operations of a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count(call: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention in one run of `call`; a multiply-add is 2.

    What torch's dispatcher shows it, by shape: a product of [m, k] and [k, n] is 2 m k n. Not seen, and so not counted:
    elementwise work, integer products (`torch._int_mm`, int8), custom kernels (Triton, C++), and products inside code
    that `torch.compile` has fused into its own kernels. Count a recipe before it is compiled; of a quantized network
    the number is a lower bound.
    """
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.filterwarnings("ignore", message=".*global hooks on modules", category=UserWarning)  # the counter's
        call()
    return int(counter.get_total_flops())
