"""A diffusers DiT of 64 tokens that learns handwritten digits in half a minute, and what it draws."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from digits import fitted, written_digits
from hasten.measure.frechet import Moments, frechet
from hasten.objectives.objective import Objective


class Digits(nn.Module):
    """(x [B, 1, 8, 8], t in [0, 1]) -> velocity, by a DiT of one token a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=3, sample_size=8,
            patch_size=1, num_embeds_ada_norm=10,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.long)
        return self.dit(hidden_states=x, timestep=t * 1000, class_labels=labels).sample


@cache
def pictures() -> Tensor:
    return written_digits().view(-1, 1, 8, 8)


def batch(step: int, size: int = 64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(step)
    return {"x0": pictures()[torch.randint(0, 1500, (size,), generator=rng)]}


def held_out(objective: Objective, nets: dict[str, Any]) -> float:
    """The loss on digits that were not trained on, the same noise every time."""
    with torch.no_grad():
        loss = objective.phases()[0].loss
        return float(loss(nets, {"x0": pictures()[1500:]}, torch.Generator().manual_seed(0)))


def learn(objective: Objective, nets: dict[str, Any], parameters: Any, steps: int, rate: float) -> None:
    loss, start = objective.phases()[0].loss, 1 << 20
    fitted(list(parameters), steps, rate, lambda i: loss(nets, batch(i), torch.Generator().manual_seed(start + i)))


@cache
def _trained() -> Digits:
    from hasten.objectives.pretrain.flow_matching import FlowMatching

    torch.manual_seed(0)
    net = Digits()
    learn(FlowMatching(), {"denoiser": net}, net.parameters(), 400, 2e-3)
    return net.eval()


def trained() -> Digits:
    """A copy of its own for each test."""
    return copy.deepcopy(_trained())


def drawn(net: Digits, count: int = 400, steps: int = 12) -> Tensor:
    """Pictures from fixed noise, by Euler's method."""
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i in range(steps, 0, -1):
            x = x - net(x, torch.full((count,), i / steps)) / steps
    return x


def distance(x: Tensor) -> float:
    """Frechet distance to the digits, of pixels."""
    return float(frechet(Moments.of(x.flatten(1)), Moments.of(pictures().flatten(1))))
