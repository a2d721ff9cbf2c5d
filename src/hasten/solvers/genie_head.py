"""GENIE's head: the derivative along the trajectory read off what the network saw anyway, one call a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hasten.denoiser import Prediction, Target, denoiser
from hasten.grid import Node

systems = ("genie",)

Seen = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, ...], t [B]) -> what the network says, like x, and what it saw last, [B, F]."""


class Head(nn.Module):
    """(features [B, F], x [B, ...], eps) -> [3, B, ...]: shares of x and eps that the features choose, and a part of
    low rank. It starts as the head of a standard normal law, (0, 0, eps).

    Args:
        features: F.
        size: elements of a sample.
        rank: width of its one layer between; it costs rank (F + 5 size) products.
    """

    def __init__(self, features: int, size: int, rank: int = 12) -> None:
        super().__init__()
        self.into = nn.Linear(features + 2 * size, rank)
        self.out, self.gate = nn.Linear(rank, 3 * size), nn.Linear(rank, 6)
        self.skip = nn.Parameter(torch.zeros(2, 3, size))
        for layer in (self.out, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.skip[1, 2] = 1

    def forward(self, features: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        flat = torch.stack([x.flatten(1), eps.flatten(1)])  # [2, B, N]
        z = nn.functional.silu(self.into(torch.cat([features, *flat], 1)))
        shares = self.skip[:, :, None] + self.gate(z).T.reshape(2, 3, -1, 1)  # [2, 3, B, N]
        said = self.out(z).unflatten(1, (3, -1)).transpose(0, 1)
        return (said + (shares * flat[:, None]).sum(0)).reshape(3, *x.shape)


@dataclass(frozen=True)
class Headed:
    """A Denoiser whose derivative a head answers, so that `genie` makes one call a step and needs no forward mode.

    With gamma = sigma / alpha and (k1, k2, k3) what the head says, d eps / d gamma = -k1 / gamma + k2 gamma / (1 +
    gamma^2) + k3 / (gamma (1 + gamma^2)). Dockhorn et al. 2022, arXiv:2210.05475 sec. 3.1 and its code's `GENIEModel`.

    Attributes:
        network: the denoiser's network, which also shows its features.
        target: what it says.
        head: such as `Head`.
    """

    network: Seen
    target: Target
    head: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, n: Node) -> Prediction:
        return self._seen(x, n)[0]

    def jet(self, x: Tensor, n: Node, dx: Callable[[Prediction], Tensor], dt: float) -> tuple[Prediction, Tensor]:
        """The prediction, and d eps / ds where t moves by `dt` along the trajectory; the head knows no other direction,
        so `dx` is not looked at."""
        p, features = self._seen(x, n)
        return p, self._bend(features, p, n).mul_(dt * _rate(n))

    def loss(self, x: Tensor, n: Node) -> Tensor:
        """Mean of gamma^2 |d eps / d gamma as the head says - as the network moves|^2 over states x [B, ...] of node n,
        which is no end; gradients reach the head alone. Its sec. 3.1, with g = gamma^2."""
        plain = denoiser(lambda x, t: self.network(x, t)[0], self.target)
        with torch.no_grad():
            p, rise = plain.jet(x, n, lambda p: p.mix(x0=n.dalpha, eps=n.dsigma), 1.0)
            features = self._seen(x, n)[1]
        off = self._bend(features, p, n) - rise / _rate(n)
        return (off * (n.sigma / n.alpha)).square().mean()

    def _seen(self, x: Tensor, n: Node) -> tuple[Prediction, Tensor]:
        out, features = self.network(x, x.new_full(x.shape[:1], n.t))
        return Prediction.of(self.target, out, x, n), features

    def _bend(self, features: Tensor, p: Prediction, n: Node) -> Tensor:
        """d eps / d gamma."""
        gamma = n.sigma / n.alpha
        k1, k2, k3 = self.head(features, p.x, p.eps)
        return (k2 * gamma + k3 / gamma) / (1 + gamma * gamma) - k1 / gamma


def _rate(n: Node) -> float:
    """d gamma / dt."""
    return (n.dsigma - n.sigma / n.alpha * n.dalpha) / n.alpha
