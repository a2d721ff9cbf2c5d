"""SageAttention: queries and keys in 8 bits, smoothed, in this network alone."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.kernels.sage import LADDER, THRESHOLD, Setting, backend, passing, sage_attention, sage_reference
from hasten.method import Method, Part, Refused, Stage
from hasten.patch import Patch
from hasten.picture import Call, attending


class Sage(Method):
    """Self-attention and joint attention from 8-bit queries and keys: keys less their mean, a scale for each block,
    exact int32 sums, softmax and values in 16 bits. Zhang et al. 2024, arXiv:2410.02367. With `values: fp8` and
    `granularity: thread` it is SageAttention 2, Zhang et al. 2024, arXiv:2411.10958; with `bits: 4` and `smooth_q` its
    int4, for study: no 4-bit products are reached, so it takes as long.

    `adaptive` asks each attention, at its first call of a shape, which setting gives a cosine of 0.998 with exact
    attention, version 2 first; where none does, it stays exact. (Not in a compiled block, which would have to stop for
    it.) Attention with a mask stays exact too. It runs on NVIDIA GPUs; `emulate` computes the same numbers slowly
    anywhere, to see what they do to pictures.
    """

    stage: ClassVar = Stage.ATTENTION
    writes: ClassVar = frozenset({Part.ATTENTION})
    systems: ClassVar = ("sageattention", "sageattention-2")
    from_tokens: ClassVar = 1024

    bits: Literal[8, 4] = Field(8, json_schema_extra={"fixed": True})
    values: Literal["fp16", "fp8"] = "fp16"
    granularity: Literal["block", "thread"] = Field("block", json_schema_extra={"fixed": True})
    smooth_q: bool = Field(False, json_schema_extra={"fixed": True})
    adaptive: bool = Field(False, json_schema_extra={"fixed": True})
    emulate: bool = Field(False, json_schema_extra={"fixed": True})

    def apply(self, model: nn.Module) -> Patch:
        blocks = [b for b in anatomy(model).blocks if any(s.kind in ("self", "joint") for s in b.attentions)]
        if not blocks:
            raise Refused(
                f"attention.sage works on self-attention of transformer blocks, and {type(model).__name__} has none: "
                "leave it out"
            )
        if not self.emulate:
            backend(next(model.parameters()).device, self.values)
        with Patch() as patch:
            for block in blocks:
                attending(patch, block, partial(self._compute, patch, {}))
            return patch.keep()

    def _compute(self, patch: Patch, chosen: dict[Any, Setting | None], call: Call) -> Tensor:
        if call.mask is not None or call.causal:
            return call.run()
        q, (k, v) = call.query, call.heads()
        setting: Setting | None = Setting(self.bits, self.values, self.smooth_q, granularity=self.granularity)
        if self.adaptive and not torch.compiler.is_compiling():
            key = call.which, q.shape, k.shape
            if key not in chosen:
                ladder = [s for s in LADDER if self.values == "fp8" or s.values == "fp16"]
                setting = chosen[key] = passing(q, k, v, THRESHOLD, ladder)
                patch.tally["layers left exact" if setting is None else f"layers with {setting.values}"] += 1
            setting = chosen[key]
        if setting is None:
            return call.run()
        settings = {f: getattr(setting, f) for f in ("bits", "values", "smooth_q", "granularity")}
        attention = sage_reference if self.emulate else sage_attention
        return attention(q, k, v, **settings).to(q.dtype)
