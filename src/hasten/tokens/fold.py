"""Tokens that are all alike at the end of the context, folded into one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.anatomy import anatomy
from hasten.method import Method, Part, Refused, Stage
from hasten.moment import now
from hasten.patch import Patch
from hasten.tokens.joint import BiasedJointAttention


class Fold(Method):
    """One context token in the place of n equal ones at the end, with ln n added to the logits of its key.

    Stable Diffusion 3 without its T5 encoder carries 256 zero tokens through every block. Equal tokens without
    positions stay equal, and attention to n equal keys is attention to one of weight n: softmax gives n e^s = e^(s +
    ln n). So the output is the same up to rounding, at the cost of the tokens left. Where nothing repeats, nothing
    changes. Only for the joint attention of SD3, whose context has no positions.
    """

    stage: ClassVar = Stage.TOKENS
    writes: ClassVar = frozenset({Part.TOKENS, Part.ATTENTION})
    sure: ClassVar = True

    def apply(self, model: nn.Module) -> Patch:
        blocks = [b.module for b in anatomy(model).blocks]
        attentions = [a for b in blocks for n in ("attn", "attn2") if (a := getattr(b, n, None)) is not None]
        if type(model).__name__ != "SD3Transformer2DModel":
            raise Refused(
                f"tokens.fold works on SD3's transformer, whose text tokens have no positions; this is a "
                f"{type(model).__name__}: leave the method out"
            )
        seen: dict[str, Any] = {}
        with Patch() as patch:
            for attention in attentions:
                patch.set(attention, "processor", BiasedJointAttention())

            names = list(inspect.signature(model.forward).parameters)

            def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                kwargs |= dict(zip(names, args, strict=False))
                context = kwargs["encoder_hidden_states"]
                here = now()
                key = (here.run, here.branch, tuple(context.shape))
                if here.step == 0 or seen.get("key") != key:  # the context is the trajectory's: counted once
                    seen["key"], seen["count"] = key, repeats(context)
                count = seen["count"]
                if count > 1:
                    patch.tally["tokens folded"] += count - 1
                    kwargs["encoder_hidden_states"] = context[:, : context.shape[1] - count + 1]
                    joint = dict(kwargs.get("joint_attention_kwargs") or {})
                    joint["attention_mask"] = self._bias(model, kwargs, count)
                    kwargs["joint_attention_kwargs"] = joint
                return forward(**kwargs)

            patch.wrap(model, around)
            return patch.keep()

    @staticmethod
    def _bias(model: nn.Module, kwargs: dict[str, Any], count: int) -> Tensor:
        x, c = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        patch = model.config.patch_size  # type: ignore[union-attr]
        tokens = (x.shape[-2] // patch) * (x.shape[-1] // patch) + c.shape[1]
        bias = torch.zeros(1, 1, 1, tokens, dtype=c.dtype, device=c.device)
        bias[..., -1] = math.log(count)
        return bias


def repeats(context_BMC: Tensor) -> int:
    """How many tokens at the end equal the last one, in every row of the batch; 1 where none repeats."""
    alike_M = (context_BMC == context_BMC[:, -1:]).all(-1).all(0)
    different = (~alike_M).nonzero()
    return len(alike_M) if len(different) == 0 else len(alike_M) - 1 - int(different[-1])
