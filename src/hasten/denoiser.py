"""What a network call means: one reading, (x, x0, eps), of every parametrisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.grid import Node

Target = Literal["x0", "eps", "v", "flow", "score"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """State and what the network sees in it: x = alpha x0 + sigma eps. All of one shape, [B, ...].

    x0 and eps are held as shares of two tensors, by default themselves: an update that is linear in them (`mix`) then
    costs one or two passes over memory, and what a solver does not ask for is never computed.

    Attributes:
        one, other: x0 and eps, or the two tensors that they are made of.
        of_x0, of_eps: shares of `one` and `other`.
    """

    x: Tensor
    one: Tensor
    other: Tensor
    of_x0: tuple[float, float] = (1.0, 0.0)
    of_eps: tuple[float, float] = (0.0, 1.0)

    @property
    def x0(self) -> Tensor:
        """The clean sample; computed at each asking."""
        return _shares(self.one, self.other, *self.of_x0)

    @property
    def eps(self) -> Tensor:
        """The noise; computed at each asking."""
        return _shares(self.one, self.other, *self.of_eps)

    def mix(self, x0: float = 0.0, eps: float = 0.0, x: float = 0.0) -> Tensor:
        """The sum of these shares of x0, eps and the state, a new tensor."""
        a = x0 * self.of_x0[0] + eps * self.of_eps[0]
        b = x0 * self.of_x0[1] + eps * self.of_eps[1]
        if self.one is self.x:
            mixed = _shares(self.one, self.other, a + x, b)
        else:
            mixed = _shares(self.one, self.other, a, b)
            mixed = mixed if x == 0 else torch.add(mixed, self.x, alpha=x)
        return mixed.clone() if mixed is self.one or mixed is self.other else mixed

    @staticmethod
    def of(target: Target, out: Tensor, x: Tensor, n: Node) -> Prediction:
        """Reads the output of a network trained on `target` at state `x` and node `n`.

        "v" is Salimans & Ho 2022, arXiv:2202.00512 eq. in sec. 4: v = alpha eps - sigma x0; "flow" is dx/dt = eps -
        x0 on alpha = 1 - t. "x0" is singular where clean, "eps" and "score" at pure noise, "v" and "flow" nowhere.

        Raises:
            ValueError: the target is unknown.
        """
        a, s = n.alpha, n.sigma
        match target:
            case "x0":
                return Prediction(x, x, out, (0.0, 1.0), (_over(1, s), -_over(a, s)))
            case "eps":
                return Prediction(x, x, out, (_over(1, a), -_over(s, a)), (0.0, 1.0))
            case "score":
                return Prediction(x, x, out, (_over(1, a), _over(s * s, a)), (0.0, -s))
            case "v":
                c = a * a + s * s
                return Prediction(x, x, out, (a / c, -s / c), (s / c, a / c))
            case "flow":
                c = a + s
                return Prediction(x, x, out, (1 / c, -s / c), (1 / c, a / c))
        raise ValueError(f"unknown target {target!r}; known: {', '.join(get_args(Target))}")


def _over(a: float, b: float) -> float:
    """a / b, infinite at b = 0, as tensors divide."""
    return a / b if b else math.inf if a else math.nan


def _shares(one: Tensor, other: Tensor, a: float, b: float) -> Tensor:
    """a one + b other, in as few passes over memory as there are."""
    if b == 0:
        return one if a == 1 else one * a
    if a == 0:
        return other if b == 1 else other * b
    if a == 1:
        return torch.add(one, other, alpha=b)
    return torch.mul(one, a).add_(other, alpha=b)


Denoiser = Callable[[Tensor, Node], Prediction]
"""Network, target and guidance as one function; a guidance takes one or two and is one."""


def denoiser(network: Callable[[Tensor, Tensor], Tensor], target: Target) -> Denoiser:
    """Reads `network(x, t)` as predictions; x is [B, ...], t is [B] in [0, 1]."""

    def ask(x: Tensor, n: Node) -> Prediction:
        return Prediction.of(target, network(x, torch.full(x.shape[:1], n.t, dtype=x.dtype, device=x.device)), x, n)

    return ask
