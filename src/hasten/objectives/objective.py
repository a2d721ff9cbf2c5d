"""An objective: what a network is taught, one loss a phase; `hasten.train` runs them all in one loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Nets = Mapping[str, nn.Module]
Batch = Mapping[str, Tensor]
Loss = Callable[[Nets, Batch, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Phase:
    """One optimizer step of an objective.

    Attributes:
        trains: names of the nets that this phase's gradient may reach.
        loss: (nets, batch, rng) -> scalar.
    """

    trains: tuple[str, ...]
    loss: Loss


class Objective(Protocol):
    """One loss, or two that take turns (a student and its critic)."""

    def phases(self) -> tuple[Phase, ...]: ...
