"""What a network call means: one reading, (x, x0, eps), of every parametrisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.grid import Node

Target = Literal["x0", "eps", "v", "flow", "score"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """State and what the network sees in it: x = alpha x0 + sigma eps. All of one shape, [B, ...]."""

    x: Tensor
    x0: Tensor
    eps: Tensor

    @staticmethod
    def of(target: Target, out: Tensor, x: Tensor, n: Node) -> Prediction:
        """Reads the output of a network trained on `target` at state `x` and node `n`.

        "v" is Salimans & Ho 2022, arXiv:2202.00512 eq. in sec. 4: v = alpha eps - sigma x0; "flow" is dx/dt = eps - x0 on
        alpha = 1 - t. "x0" is singular where clean, "eps" and "score" at pure noise, "v" and "flow" nowhere.

        Raises:
            ValueError: the target is unknown.
        """
        a, s = n.alpha, n.sigma
        match target:
            case "x0":
                return Prediction(x, out, (x - a * out) / s)
            case "eps":
                return Prediction(x, (x - s * out) / a, out)
            case "score":
                return Prediction(x, (x + s * s * out) / a, -s * out)
            case "v":
                c = a * a + s * s
                return Prediction(x, (a * x - s * out) / c, (s * x + a * out) / c)
            case "flow":
                return Prediction(x, (x - s * out) / (a + s), (x + a * out) / (a + s))
        raise ValueError(f"unknown target {target!r}; known: {', '.join(get_args(Target))}")


Denoiser = Callable[[Tensor, Node], Prediction]
"""Network, target and guidance as one function; a guidance takes one or two and is one."""


def denoiser(network: Callable[[Tensor, Tensor], Tensor], target: Target) -> Denoiser:
    """Reads `network(x, t)` as predictions; x is [B, ...], t is [B] in [0, 1]."""

    def ask(x: Tensor, n: Node) -> Prediction:
        return Prediction.of(target, network(x, torch.full(x.shape[:1], n.t, dtype=x.dtype, device=x.device)), x, n)

    return ask
