"""A linear layer in 8-bit integers: pure functions, and the one dispatch that picks oneDNN (CPU) or cuBLAS (CUDA).

Letters of shapes: M tokens, I input features, O output features. With activations x = s_M1 q_MI and weights
w = c_O1 q_OI, both symmetric, x w^T = s_M1 c_1O (q_MI q_OI^T): the sum is exact in int32, so the error is that of the
two roundings. Dettmers et al. 2022, arXiv:2208.07339 section 2.1 (vector-wise quantization).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.kernels import int8_onednn as onednn
from hasten.method import Refused

Activations = Literal["token", "tensor"]

LEAST = 1e-30  # a row of zeros gets this range instead of a division by zero
CUDA_ROWS, CUDA_STEP = 32, 8  # torch._int_mm takes more than 16 rows, and features in multiples of 8
INT8_CPU = ("avx512_vnni", "avx_vnni", "amx_int8")  # without one, oneDNN's int8 sums saturate at 16 bits


def quantize_rows(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 of each row.

    Returns:
        q [O, I] int8 in [-127, 127] and scale [O, 1] float32, with |scale * q - w| <= scale / 2 where a row's largest
        value is at least 1e-30.

    >>> q, scale = quantize_rows(torch.tensor([[0.5, -2.0, 1.0]]))
    >>> q.tolist()
    [[32, -127, 64]]
    """
    scale_O1 = w_OI.float().abs().amax(1, keepdim=True).clamp_min(LEAST) / 127
    return torch.round(w_OI.double() / scale_O1.double()).to(torch.int8), scale_O1


def quantize_tokens(
    x: Tensor, activations: Activations = "token", dtype: torch.dtype = torch.int8
) -> tuple[Tensor, Tensor]:
    """Symmetric 8 bits of activations [..., I], with a scale for each token or one for all.

    Args:
        dtype: int8, or uint8 for q + 128.

    Returns:
        q [..., I] and scale float32, [..., 1] or [1], with |scale * q - x| <= scale / 2 to the rounding of float32. The
        scales of bfloat16 activations have the 8 significant bits of bfloat16, so that they can be handed on in either.
    """
    wide = x.float()
    most = wide.abs().amax(-1, keepdim=True) if activations == "token" else wide.abs().amax().reshape(1)
    scale = most.clamp_min(LEAST) * (1 / 127)
    scale = _eight_bits(scale) if x.dtype == torch.bfloat16 else scale
    zero = onednn.ZERO if dtype == torch.uint8 else 0
    return (torch.round(wide * (1 / scale)) + zero).to(dtype), scale


def _eight_bits(s: Tensor) -> Tensor:
    """Rounded to 8 significant bits (Veltkamp's splitting); a cast to bfloat16 and back is dropped by compilers."""
    c = s * (2.0**16 + 1)
    return c - (c - s)


def int8_linear_reference(
    x: Tensor, q_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None = None, activations: Activations = "token"
) -> Tensor:
    """What `int8_linear` must equal, in exact int32 sums and float32 after them: [..., I] -> float32 [..., O]."""
    q, scale = quantize_tokens(x, activations)
    sums = torch.matmul(q.int(), q_OI.int().T)
    y = sums.double() * scale.double() * scale_O1.double().T
    return (y if bias_O is None else y + bias_O.double()).float()


def backend(device: torch.device) -> Literal["onednn", "cuda"]:
    """Which integer kernels a device has.

    Raises:
        Refused: none that is fast; nothing is simulated.
    """
    if device.type == "cpu":
        if not onednn.available():
            raise Refused("int8 linears need oneDNN's operators, and this torch has none: install one that has")
        if not any(cpu_features().get(f) for f in INT8_CPU):
            raise Refused(
                f"int8 linears need a CPU with one of {', '.join(INT8_CPU)}, and this one has none, so int8 would be"
                " slower than bfloat16: leave quant.w8a8 out, or run on such a CPU or on CUDA"
            )
        return "onednn"
    if device.type == "cuda" and torch.version.cuda:
        if torch.cuda.get_device_capability(device) < (7, 5):
            raise Refused("int8 linears on CUDA need compute capability 7.5 (Turing) or newer: leave quant.w8a8 out")
        return "cuda"
    raise Refused(
        f"int8 linears run on x86 CPUs and on NVIDIA GPUs, not on {device.type!r}:"
        " leave quant.w8a8 out, or move the model"
    )


def cpu_features() -> dict[str, Any]:
    """Instruction sets of this CPU by name."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"avx512_vnni": torch.cpu._is_vnni_supported()}  # torch before 2.10


def pack(q_OI: Tensor) -> Tensor:
    """The weights in the form that the kernel of their device reads. Raises Refused where there is no kernel."""
    if backend(q_OI.device) == "onednn":
        return onednn.pack(q_OI)
    return _padded(q_OI, CUDA_STEP, CUDA_STEP)


def unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The int8 weights [O, I] again."""
    if packed.is_mkldnn:
        return onednn.unpack(packed)
    return packed[:out_features, :in_features].contiguous()


def int8_linear(
    x: Tensor, packed: Tensor, scale_O1: Tensor, bias_O: Tensor | None = None, activations: Activations = "token"
) -> Tensor:
    """x [..., I] times the packed weights, plus bias: [..., O] in the precision of `x`.

    Inside `torch.compile` the quantization fuses with its neighbours, and layers that read one tensor share the pass.
    Outside, it is a kernel compiled on first use (seconds), or plain operators where there is no C++ compiler.

    Raises:
        Refused: a gradient is asked for.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise Refused("int8 linears have no gradient: run under torch.no_grad(), or remove quant.w8a8 before training")
    x_MI = x.reshape(-1, x.shape[-1]).contiguous()
    linear = onednn_linear if x.device.type == "cpu" else cuda_linear
    return linear(x_MI, packed, scale_O1, bias_O, activations).reshape(*x.shape[:-1], scale_O1.shape[0])


def onednn_linear(
    x_MI: Tensor, packed: Tensor, scale_O1: Tensor, bias_O: Tensor | None, activations: Activations
) -> Tensor:
    """`int8_linear` of contiguous rows on a CPU. Tokens' scales come after the product: oneDNN takes one for all."""
    out = torch.bfloat16 if x_MI.dtype == torch.bfloat16 else torch.float32
    compiling = torch.compiler.is_compiling()
    q_MI, scale = fused(quantize_tokens, "cpu")(x_MI, activations, torch.uint8)
    product = onednn.product_in_graph if compiling else onednn.product
    if activations == "tensor":
        return product(q_MI, scale, packed, scale_O1, bias_O, out).to(x_MI.dtype)
    y_MO, s_M1 = product(q_MI, None, packed, scale_O1, None, out), scale.to(out)
    into = None if compiling else y_MO  # a fresh buffer of this size costs as much as the arithmetic
    y_MO = torch.mul(y_MO, s_M1, out=into) if bias_O is None else torch.addcmul(bias_O.to(out), y_MO, s_M1, out=into)
    return y_MO.to(x_MI.dtype)


def cuda_linear(
    x_MI: Tensor, packed: Tensor, scale_O1: Tensor, bias_O: Tensor | None, activations: Activations
) -> Tensor:
    """`int8_linear` of rows through `torch._int_mm`, padded to the sizes that it takes."""
    device = x_MI.device.type
    q_MI, scale = fused(quantize_tokens, device)(x_MI, activations, torch.int8)
    sums_MO = torch._int_mm(_padded(q_MI, CUDA_ROWS, CUDA_STEP), packed.T)[: x_MI.shape[0], : scale_O1.shape[0]]
    return fused(_rescaled, device)(sums_MO, scale, scale_O1, bias_O, x_MI.dtype)


def _rescaled(sums_MO: Tensor, scale: Tensor, scale_O1: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    y_MO = sums_MO.float() * scale * scale_O1.T
    return (y_MO if bias_O is None else y_MO + bias_O).to(dtype)


def _padded(q_RC: Tensor, rows: int, columns: int) -> Tensor:
    more_rows, more_columns = -q_RC.shape[0] % rows, -q_RC.shape[1] % columns
    return torch.nn.functional.pad(q_RC, (0, more_columns, 0, more_rows)) if more_rows or more_columns else q_RC


def fused(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`function` as one kernel: by the compilation that is under way, or else by one of its own."""
    return function if torch.compiler.is_compiling() else _compiled(function, device)


@functools.cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True) if _compiles(device) else function


@functools.cache
def _compiles(device: str) -> bool:
    try:
        with torch.no_grad():
            torch.compile(quantize_tokens, dynamic=True)(torch.ones(4, 32, device=device), "token", torch.uint8)
    except Exception:  # no compiler, or none that works: its errors share no narrower class
        return False
    return True
