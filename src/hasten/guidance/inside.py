"""Guidances inside pipelines, which compute u + s (c - u) themselves: what to answer so that ours comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten import denoiser
from hasten.denoiser import Prediction
from hasten.grid import Node
from hasten.halves import Conditional, instead, said, split
from hasten.method import Refused
from hasten.moment import Moment, now
from hasten.patch import Patch

Answer = Callable[[Moment, Node, float, Prediction, Prediction], Prediction]
"""(here, node, scale, conditional, unconditional) -> guided."""


def guided(label: str, model: nn.Module, answer: Answer) -> Patch:
    """Makes a pipeline's own u + s (c - u) give what `answer` says.

    Where both branches are one batch, both halves are answered with the guided prediction g: u + s (c - u) of g and g
    is g. Where they are two calls, the conditional comes first and is left alone; the second is answered with u' = (s c
    - g) / (s - 1), and u' + s (c - u') is g. (In half precision u' rounds s / (s - 1) times as much as g.) Where no
    guidance runs, nothing changes.

    Predictions are read with the network's first input for the state: it is alpha x0 + sigma eps also where the
    scheduler scaled its own. A learned variance stays as it is.

    Raises, at the call:
        Refused: nobody told the scale or what the network says, or the pipeline computes something else than u + s (c -
            u), as Qwen's and Lumina's do with their norms; see `Moment`.
    """
    first = list(inspect.signature(type(model).forward).parameters)[1]
    cond = Conditional()

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        here, out = now(), forward(*args, **kwargs)
        if here.branch == "cond":
            cond.keep(here, out)
        both = here.branch == "both"
        given = cond.take(here) if here.branch == "uncond" else None
        if not both and given is None:
            return out
        scale, node, target = here.scale, here.node, here.target
        if scale is None or node is None or target is None:
            raise Refused(
                f"{label} works in pipelines that compute u + s (c - u) with a guidance_scale and have a scheduler "
                "that hasten reads, and this is none: leave it out"
            )
        new, x = said(out).clone(), kwargs[first] if first in kwargs else args[0]
        u, c = split(new) if both else (new, said(given))
        x = split(x)[1] if both else x
        part = tuple(slice(min(sizes)) for sizes in zip(x.shape, c.shape, strict=True))  # not variances, nor masks

        def read(m: Tensor) -> Prediction:
            return Prediction.of(target, here.sign * _wide(m[part]), _wide(x[part]), node)

        g = here.sign * denoiser.said(target, answer(here, node, scale, read(c), read(u)), node)
        u[part] = g if both else (scale * _wide(c[part]) - g) / (scale - 1)
        if both:
            c[part] = g
        patch.tally["guided"] += 1
        return instead(out, new)

    with Patch() as patch:
        patch.wrap(model, around)
        return patch.keep()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
