"""Handwritten digits, and a small network of them that trains in seconds."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor


class Small(torch.nn.Module):
    """A network on 8 x 8 digits that says v, and shows its last features."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = torch.nn.Linear(64 + 16, 256), torch.nn.Linear(256, 64)
        self.between = torch.nn.ModuleList([torch.nn.Linear(256, 256) for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        waves = t[:, None] * torch.arange(1, 9) * 1.5
        h = torch.nn.functional.silu(self.into(torch.cat([x, waves.sin(), waves.cos()], 1)))
        for layer in self.between:
            h = h + torch.nn.functional.silu(layer(h))
        return self.out(h), h


def written_digits() -> Tensor:
    """[1797, 64] in [-1, 1]: the file that scikit-learn brings, read without importing it."""
    found = find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-learn, which brings the digits, is not installed")
    file = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    return torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32)[:, :64]) / 8 - 1


def fitted(parameters: list[torch.nn.Parameter], steps: int, rate: float, loss: Callable[[int], Tensor]) -> None:
    optimizer = torch.optim.Adam(parameters, rate)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 10 * (i + 1) / steps, 1.2 * (1 - i / steps))
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()
