"""The step of a layer's activations as a function of time, learned by a small network and tabulated before sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH, HIDDEN = 128, 64


class StepOfTime(nn.Module):
    """time -> step > 0: the time's waves, three layers of 64 with ReLU, and softplus. So et al. 2023, TDQ,
    arXiv:2306.02316 sec. 4.2; sizes and waves as in the authors' code.

    Args:
        start: about what every step is before training.
        width: of the waves, even.
        dropout: of the last hidden layer, while training.
    """

    def __init__(self, start: float, width: int = WIDTH, dropout: float = 0.2) -> None:
        super().__init__()
        if start <= 0 or width % 2:
            raise ValueError(f"a step is positive and waves come in pairs; given {start} and {width}")
        self.width = width
        sizes = (width, HIDDEN, HIDDEN, HIDDEN)
        hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        last = nn.Linear(HIDDEN, 1)
        nn.init.constant_(last.bias, start + math.log(-math.expm1(-start)))  # softplus undone, for any size
        self.layers = nn.Sequential(*hidden, nn.Dropout(dropout), last)

    def forward(self, t: Tensor) -> Tensor:
        """t [B], in the network's own units (0 to 1000) -> [B]."""
        half = self.width // 2
        angles = t.float()[:, None] * torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
        return nn.functional.softplus(self.layers(torch.cat([angles.cos(), angles.sin()], 1))).squeeze(1)

    @torch.no_grad()
    def table(self, times: Sequence[float]) -> Tensor:
        """The steps of these times: what sampling reads, at no cost of its own."""
        training = self.training
        found = self.eval()(torch.tensor(times, device=next(self.parameters()).device))
        self.train(training)
        return found
