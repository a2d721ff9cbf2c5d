"""The variational bound of a diffusion model, with a noise schedule that may learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.functional import logsigmoid

from hasten.objectives.objective import Batch, Nets, Phase

systems: tuple[str, ...] = ("vdm",)


@dataclass(frozen=True, slots=True)
class Variational:
    """The bound on -log p(x0) of a variance preserving model in continuous time, in nats: Kingma et al. 2021,
    arXiv:2107.00630 sec. 5, with gamma = gamma_0 + (gamma_1 - gamma_0) shape(t), alpha^2 = sigmoid(-gamma).

    Its three parts are the divergence of x_1 from pure noise; that of x0 from x_0, with the decoder N(x_0 / alpha_0,
    (sigma_0 / alpha_0)^2), as is right for continuous data; and E gamma' |eps - eps_hat|^2 / 2 over even times. The
    last does not depend on the shape between the ends, which only moves its variance: so the ends learn with the
    network by the bound, and the shape by its square (sec. 5.3 there and its appendix).

    Attributes:
        gamma_0, gamma_1: ends, where nets has no "ends" (`hasten.paths.learned.Ends`) that learns them.
        learns: the schedule learns: nets has "ends" and "shape" (`hasten.paths.learned.Rising`).
    """

    gamma_0: float = -13.3
    gamma_1: float = 5.0
    learns: bool = False

    def phases(self) -> tuple[Phase, ...]:
        if not self.learns:
            return (Phase(("denoiser",), self.loss),)
        return Phase(("denoiser", "ends"), self.loss), Phase(("shape",), self.variance)

    def loss(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Mean of the bound over the batch and over elements, a scalar."""
        return self.bound({k: still(v) if k == "shape" else v for k, v in nets.items()}, batch, rng).mean()

    def variance(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Mean square of the bound over the batch, a scalar, which trains the shape alone: its mean does not depend on
        it."""
        return self.bound({k: v if k == "shape" else still(v) for k, v in nets.items()}, batch, rng).square().mean()

    def bound(self, nets: Mapping[str, Callable[..., Any]], batch: Batch, rng: torch.Generator) -> Tensor:
        """An estimate for each row, [B], over its elements.

        batch["x0"] is [B, ...]; all else in it goes by name to nets["denoiser"](x, u, **rest), which says eps. u =
        shape(t) is the time on the path whose gamma is even between the same ends, so that the network may be sampled
        on `LogSNR(gamma_0, gamma_1)` whatever shape it was trained with. Times are even over the batch but for one
        common shift (the paper's appendix).
        """
        rest = dict(batch)
        x0 = rest.pop("x0")
        eps = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        t = (torch.rand((), generator=rng, device=rng.device) + torch.arange(len(x0), device=rng.device) / len(x0)) % 1
        first, last = nets["ends"]() if "ends" in nets else x0.new_tensor([self.gamma_0, self.gamma_1])
        u, du = jvp(nets.get("shape", torch.clone), (t.to(x0),), (torch.ones_like(t).to(x0),))  # type: ignore[misc]
        gamma = (first + (last - first) * u).reshape(-1, *[1] * (x0.ndim - 1))
        x = torch.sqrt(torch.sigmoid(-gamma)) * x0 + torch.sqrt(torch.sigmoid(gamma)) * eps
        error = _mean((eps - nets["denoiser"](x, u, **rest).to(x0)).square())
        prior = torch.sigmoid(-last) * _mean(x0**2) - torch.sigmoid(-last) - logsigmoid(last)
        decoder = log(2 * pi) + first + 1  # the square of its deviate is eps^2, of mean 1
        return ((last - first) * du * error + prior + decoder) / 2


def still(net: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose own weights get no gradient."""
    if not isinstance(net, nn.Module):
        return net
    return lambda *args, **rest: functional_call(net, {k: p.detach() for k, p in net.named_parameters()}, args, rest)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)
