"""An exponential moving average of weights, the copy that is used after training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Average of the weights of nets, w <- d w + (1 - d) new, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The ramp lets an early average follow the weights (the rule of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, nets: Mapping[str, nn.Module], decay: float) -> None:
        self.decay, self.count = decay, 0
        self.values: dict[str, Tensor] = {
            f"{k}/{n}": p.detach().clone() for k, net in nets.items() for n, p in net.named_parameters()
        }

    @torch.no_grad()
    def update(self, nets: Mapping[str, nn.Module]) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        fresh = {f"{k}/{n}": p.detach() for k, net in nets.items() for n, p in net.named_parameters()}
        torch._foreach_lerp_(list(self.values.values()), [fresh[k] for k in self.values], 1 - decay)

    @torch.no_grad()
    def copy_to(self, nets: Mapping[str, nn.Module]) -> None:
        """Overwrites the nets' weights by the average."""
        for k, net in nets.items():
            for n, p in net.named_parameters():
                p.copy_(self.values[f"{k}/{n}"])

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, **self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        self.values = {k: v for k, v in state.items() if k != "count"}
