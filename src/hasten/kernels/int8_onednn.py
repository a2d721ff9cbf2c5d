"""The packed int8 product of oneDNN on x86 CPUs, in a form that `torch.compile` accepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ZERO = 128  # zero point of uint8 activations: VNNI and AMX multiply unsigned by signed
OPERATORS = ("qlinear_prepack", "qlinear_pointwise")


def available() -> bool:
    """Whether this build of torch has the operators."""
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.onednn, name) for name in OPERATORS)


def pack(q_OI: Tensor) -> Tensor:
    """int8 weights in oneDNN's blocked layout: as many bytes, opaque, of shape [I, O]."""
    return torch.ops.onednn.qlinear_prepack(q_OI.contiguous(), None)


def unpack(packed: Tensor) -> Tensor:
    """The int8 weights [O, I] again."""
    return packed.to_dense().T.contiguous()


def product(
    q_MI: Tensor, scale: Tensor | None, packed: Tensor, scale_O1: Tensor, bias_O: Tensor | None, out: torch.dtype
) -> Tensor:
    """scale * scale_O * (q - 128) w^T + bias, summed in int32.

    Args:
        q_MI: uint8, contiguous.
        scale: [1], or None for 1.
        out: bfloat16 or float32.
    """
    c_O = scale_O1.flatten()
    zeros = torch.zeros_like(c_O, dtype=torch.int32)
    bias_O = None if bias_O is None else bias_O.float()
    rest: tuple[Any, ...] = (packed, c_O, zeros, bias_O, 1.0, 0, out, "none", [], "")
    if scale is None:
        return torch.ops.onednn.qlinear_pointwise(q_MI, 1.0, ZERO, *rest)
    return torch.ops.onednn.qlinear_pointwise.tensor(q_MI, scale, torch.tensor([ZERO], dtype=torch.int32), *rest)


# inductor takes oneDNN's own operator only where weights are constants of the graph; to one of ours it is blind
product_in_graph = torch.library.custom_op("hasten::int8_product", product, mutates_args=())


@product_in_graph.register_fake
def _(q_MI: Tensor, scale: Any, packed: Tensor, scale_O1: Tensor, bias_O: Any, out: torch.dtype) -> Tensor:
    return q_MI.new_empty((q_MI.shape[0], scale_O1.shape[0]), dtype=out)
