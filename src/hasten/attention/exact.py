"""Exact attention by the kernel of one's choice, or the fastest on this machine."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.kernels.backends import Backend, attend, check, fastest
from hasten.method import Method, Part, Refused, Stage
from hasten.patch import Patch
from hasten.picture import Call, attending


class Exact(Method):
    """All attention of this network's blocks, of this one network alone, runs on one backend: torch's flash, cuDNN,
    memory-efficient, flex or plain kernels, hasten's tiles in plain operators and rows (two products at a time, for
    CPUs), or FlashAttention 2 and 3 where their packages are installed. Same numbers to rounding. auto times all that
    take the network's shapes, once a shape, and keeps torch's choice where none is clearly faster; sdpa changes
    nothing.

    Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691; Shah et al. 2024, arXiv:2407.08608.
    """

    stage: ClassVar = Stage.ATTENTION
    writes: ClassVar = frozenset({Part.ATTENTION})
    systems: ClassVar = ("flashattention", "flashattention-2")
    neutral: ClassVar[dict[str, Any]] = {"backend": "sdpa"}
    from_tokens: ClassVar = 1024

    backend: Literal[
        "auto", "sdpa", "flash", "cudnn", "efficient", "math", "flex", "tiled", "rows", "flash_attn_2", "flash_attn_3"
    ] = Field("auto", json_schema_extra={"fixed": True})

    def apply(self, model: nn.Module) -> Patch:
        blocks = [b for b in anatomy(model).blocks if b.attentions]
        if not blocks:
            raise Refused(
                f"attention.exact works on transformer blocks, and {type(model).__name__} has none: leave it out"
            )
        if self.backend not in ("auto", "sdpa"):
            check(self.backend, next(model.parameters()).device.type)
        with Patch() as patch:
            if self.backend != "sdpa":
                for block in blocks:
                    attending(patch, block, self._compute, every=True)
            return patch.keep()

    def _compute(self, call: Call) -> Tensor:
        more = dict(call.more or {})
        if more.pop("scale", None) is not None or call.causal or call.dropout:
            return call.run()  # not what these kernels are called with
        q, (k, v) = call.query, call.heads()
        name: Backend | None
        if self.backend == "auto":
            mask = None if call.mask is None else tuple(call.mask.shape)
            name = fastest(q.device.type, q.dtype, tuple(q.shape), tuple(k.shape), mask)
        else:
            name = check(self.backend, q.device.type)
        if name == "rows" and torch.compiler.is_compiling():
            name = None  # its loops would be written out
        return call.run() if name is None else attend(name, q, k, v, call.mask)
