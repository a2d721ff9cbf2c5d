"""bfloat16 weights and arithmetic."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.method import Method, Part, Stage, in_memory
from hasten.patch import Patch

WIDE = (torch.float32, torch.float16)
ADDED = ("pe", "temp_pos_embed")

_WITHIN: ContextVar[bool] = ContextVar("hasten_bf16", default=False)


class BF16(Method):
    """Weights in bfloat16, floating inputs cast on the way in and the output back to the caller's precision.

    Half the bytes; on CPUs with AMX or AVX-512 BF16 and on GPUs two to ten times the matrix rate of float32. A
    relative rounding error of 2^-9 a value. Times, position ids and buffers (rotary tables) keep their precision, and
    so do the modules that a diffusers model lists as `_keep_in_fp32_modules`. Removal puts the float32 numbers back,
    bit for bit: they wait in a temporary file (CPU) or in host memory (GPU), not on the device.
    """

    stage: ClassVar = Stage.ADAPT
    writes: ClassVar = frozenset({Part.PRECISION})
    sure: ClassVar = True

    def apply(self, model: nn.Module) -> Patch:
        in_memory(self, model)
        with Patch() as patch:
            kept = getattr(model, "_keep_in_fp32_modules", None) or ()
            wide = [
                p for n, p in model.named_parameters() if p.dtype in WIDE and not any(k in n.split(".") for k in kept)
            ]
            before = wide[0].dtype if wide else torch.float32
            patch.park([*wide, *_added(model)], torch.bfloat16)
            for part in model.modules():
                if "hidden_dtype" in inspect.signature(type(part).forward).parameters:
                    patch.wrap(part, _told)
            patch.wrap(model, _at_border)
            if wide and isinstance(getattr(type(model), "dtype", None), property):
                # pipelines make latents and embeddings in the network's dtype: those stay as precise as they were;
                # within its forward the network asks for its own
                told = property(lambda _: torch.bfloat16 if _WITHIN.get() else before)
                patch.extend(model, {"dtype": told})
            return patch.keep()


def _at_border(forward: Any, *args: Any, **kwargs: Any) -> Any:
    given = next((a.dtype for a in (*args, *kwargs.values()) if _floating(a) and a.ndim > 1), torch.float32)
    narrowed = {k: v if k.endswith("_ids") else narrow(v) for k, v in kwargs.items()}
    token = _WITHIN.set(True)
    try:
        out = forward(*(narrow(a) for a in args), **narrowed)
    finally:
        _WITHIN.reset(token)
    return _cast(out, given)


def _told(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """An embedding that is told its dtype, by some networks that of the time."""
    return forward(*args, **{k: torch.bfloat16 if k == "hidden_dtype" else v for k, v in kwargs.items()})


def _added(model: nn.Module) -> list[torch.Tensor]:
    """Buffers that are added to what passes, which would make it wide again."""
    return [b for n, b in model.named_buffers() if n.rpartition(".")[2] in ADDED and b.dtype in WIDE]


def narrow(value: Any) -> Any:
    """bfloat16 of the tensors of two or more dimensions; a time, [] or [B], keeps its precision."""
    return _cast(value, torch.bfloat16, 2)


def _floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype, ndim: int = 0) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if _floating(value) and value.ndim >= ndim else value
    if isinstance(value, dict):  # a ModelOutput is rebuilt as itself
        return type(value)(**{k: _cast(v, dtype, ndim) for k, v in value.items()})
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_cast(v, dtype, ndim) for v in value)
    return value
