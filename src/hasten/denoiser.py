"""What a network call means: one reading, (x, x0, eps), of every parametrisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.grid import Node, nodes
from hasten.path import Path

Target = Literal["x0", "eps", "v", "flow", "score"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """State and what the network sees in it: x = alpha x0 + sigma eps. All of one shape, [B, ...].

    x0 and eps are held as shares of two tensors, by default themselves: an update that is linear in them (`mix`) then
    costs one or two passes over memory, and what a solver does not ask for is never computed.

    Attributes:
        one, other: x0 and eps, or the two tensors that they are made of.
        of_x0, of_eps: shares of `one` and `other`.
        spread: what a network with a learned variance says of it, in [-1, 1] from the posterior's to beta; else None.
            Nichol & Dhariwal 2021, arXiv:2102.09672 eq. 15.
    """

    x: Tensor
    one: Tensor
    other: Tensor
    of_x0: tuple[float, float] = (1.0, 0.0)
    of_eps: tuple[float, float] = (0.0, 1.0)
    spread: Tensor | None = None

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


def said(target: Target, p: Prediction, n: Node) -> Tensor:
    """What a network trained on `target` says where it sees `p` at node `n`: the inverse of `Prediction.of`. Raises
    ValueError for an unknown target."""
    match target:
        case "x0":
            return p.mix(x0=1)
        case "eps":
            return p.mix(eps=1)
        case "score":
            return p.mix(eps=_over(-1, n.sigma))
        case "v":
            return p.mix(x0=-n.sigma, eps=n.alpha)
        case "flow":
            return p.mix(x0=-1, eps=1)
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


@dataclass(frozen=True)
class denoiser:
    """Reads `network(x, t)` as predictions; x is [B, ...], t is [B] in [0, 1]. A Denoiser that also answers many times
    in one network call, and derivatives along a line.

    Attributes:
        network: (x, t) -> [B, ...].
        target: what it says.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    target: Target

    def __call__(self, x: Tensor, n: Node) -> Prediction:
        t = torch.full(x.shape[:1], n.t, dtype=x.dtype, device=x.device)
        return Prediction.of(self.target, self.network(x, t), x, n)

    def many(self, xs: Tensor, nodes: Sequence[Node]) -> list[Prediction]:
        """Of xs [K, B, ...], each at its own node, from one network call on K B rows."""
        times = torch.tensor([n.t for n in nodes], dtype=xs.dtype, device=xs.device)
        out = self.network(xs.flatten(0, 1), times.repeat_interleave(xs.shape[1])).unflatten(0, xs.shape[:2])
        return [Prediction.of(self.target, o, x, n) for o, x, n in zip(out, xs, nodes, strict=True)]

    def jet(self, x: Tensor, n: Node, dx: Callable[[Prediction], Tensor], dt: float) -> tuple[Prediction, Tensor]:
        """The prediction, and d eps / ds where x moves as dx(prediction) and t as `dt` by ds: one call, and one in
        forward mode."""
        t = x.new_full(x.shape[:1], n.t)
        p = self(x, n)
        along = dx(p)
        with torch.inference_mode(False):  # forward mode is off there
            point, change = (x.clone(), t), (along.clone(), torch.full_like(t, dt))
            out, moved = torch.func.jvp(self.network, point, change)  # type: ignore[misc]
        of_x, of_out = _eps_shares(self.target, n.alpha, n.sigma)
        slope = _slope(lambda a, s: _eps_shares(self.target, a, s), n, dt)
        return p, slope[0] * x + of_x * along + slope[1] * out + of_out * moved


def _eps_shares(target: Target, a: float, s: float) -> tuple[float, float]:
    """eps as shares of (x, what the network said)."""
    zero = torch.zeros(())
    return Prediction.of(target, zero, zero, Node(0.0, a, s, 0.0, 0.0, 0.0)).of_eps


def _slope(f: Callable[[float, float], tuple[float, float]], n: Node, dt: float) -> tuple[float, float]:
    """d f / ds of two numbers on the path at n, by central differences in float64: f is a ratio of low degree."""
    h = 1e-5 * min(1.0, n.sigma / max(abs(n.dsigma * dt), 1e-30), n.alpha / max(abs(n.dalpha * dt), 1e-30))
    da, ds = n.dalpha * dt * h, n.dsigma * dt * h
    up, down = f(n.alpha + da, n.sigma + ds), f(n.alpha - da, n.sigma - ds)
    return (up[0] - down[0]) / (2 * h), (up[1] - down[1]) / (2 * h)


def on_path(denoise: Denoiser, trained: Path) -> Denoiser:
    """A denoiser of the path `trained`, asked on any other: where both have the same lam they see the same picture, up
    to a scale. Karras et al. 2022, arXiv:2206.00364 sec. 3; Kingma et al. 2021, arXiv:2107.00630 sec. 5.1.

    Raises:
        ValueError: when asked at a lam that the trained path does not reach.
    """

    @lru_cache(maxsize=4096)
    def own(lam: float) -> Node:
        t = float(trained.time(torch.tensor(lam, dtype=torch.float64)))
        if not -1e-9 <= t <= 1 + 1e-9:
            raise ValueError(f"lam = {lam:.3f} lies outside the path that the network was trained on (t = {t:.4f})")
        return nodes(trained, [min(1.0, max(0.0, t))])[0]

    def ask(x: Tensor, n: Node) -> Prediction:
        at = own(n.lam) if n.end is None else replace(own(n.lam), end=own(n.end.lam))
        scale = at.sigma / n.sigma if n.alpha < n.sigma else at.alpha / n.alpha
        p = denoise(x * scale, at)
        return Prediction(x, p.x0, p.eps)

    return ask
