"""Attention transfer: the layers of an approximate attention learn what softmax attention gives, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.attention.learned import Learned
from hasten.objectives.objective import Batch, Nets, Phase
from hasten.path import Path
from hasten.paths.flow import Flow

systems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionTransfer:
    """Mean over the attentions of |approximate - softmax|^2 / |softmax|^2, of the same queries, keys and values, while
    the network runs as it was trained, on x_t = alpha x0 + sigma eps at even times. Zhang et al. 2024, arXiv:2402.04347
    (Hedgehog) train their maps so, on attention weights; here it is on outputs, which need no square matrix.

    Zero where the approximation is exact. Trains nets["learned"], what a method's `tunable` gave, on nets["denoiser"],
    the network that it was applied to.

    Attributes:
        path: that the network was trained on; straight unless given.
    """

    path: Path = field(default_factory=Flow)

    def phases(self) -> tuple[Phase, ...]:
        return (Phase(("learned",), self.loss),)

    def loss(self, nets: Nets, batch: Batch, rng: torch.Generator) -> Tensor:
        """Scalar; batch["x0"] is [B, ...]; all else in the batch goes to nets["denoiser"](x, t, **rest) by name. Raises
        ValueError where no approximate attention ran."""
        learned, rest = nets["learned"], dict(batch)
        assert isinstance(learned, Learned)
        x0 = rest.pop("x0")
        eps = torch.randn(x0.shape, generator=rng, device=rng.device).to(x0)
        t = torch.rand(len(x0), generator=rng, device=rng.device).to(x0)
        t_B = t.reshape(-1, *[1] * (x0.ndim - 1))
        learned.gaps = []
        try:
            nets["denoiser"](self.path.alpha(t_B) * x0 + self.path.sigma(t_B) * eps, t, **rest)
            gaps = learned.gaps
        finally:
            learned.gaps = None
        if not gaps:
            raise ValueError("no approximate attention ran: apply a method's `tunable` to this network first")
        return torch.stack(gaps).mean()
