"""Scale and shift of kept features: per channel the affine map that brings them closest to the true ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten import labelled

Place = tuple[str, str, int]
"""A block's dotted name, "x" or "c" for its stream, and the step."""


def along(channels_C: Tensor, like: Tensor) -> Tensor:
    """Per-channel numbers in the shape that broadcasts over features: the last dimension of tokens [B, N, C], the
    second of images and videos [B, C, ...]."""
    channels_C = channels_C.to(like.device, like.dtype)
    return channels_C if like.ndim <= 3 else channels_C.view(-1, *[1] * (like.ndim - 2))


@dataclass
class Sums:
    """What the least squares of one place need of the pairs seen: [C] each, double precision."""

    count: int = 0
    kept: Tensor | float = 0.0
    true: Tensor | float = 0.0
    square: Tensor | float = 0.0
    cross: Tensor | float = 0.0

    def add(self, kept: Tensor, true: Tensor) -> None:
        """One more pair of features of one shape."""
        a, b = (t.detach().double().movedim(-1 if t.ndim <= 3 else 1, -1).flatten(0, -2) for t in (kept, true))
        self.count += len(a)
        self.kept, self.true = self.kept + a.sum(0), self.true + b.sum(0)
        self.square, self.cross = self.square + (a * a).sum(0), self.cross + (a * b).sum(0)

    def solve(self) -> Tensor:
        """[2, C]: the scale a and shift b that minimise sum (a kept + b - true)^2 of each channel; a = 1 where the
        kept feature never varies. Scale 1 and shift 0, exactly, before any pair was seen, as a scalar channel."""
        if self.count == 0:
            return torch.tensor([[1.0], [0.0]])
        k, t = torch.as_tensor(self.kept) / self.count, torch.as_tensor(self.true) / self.count
        var, cov = torch.as_tensor(self.square) / self.count - k * k, torch.as_tensor(self.cross) / self.count - k * t
        flat = var <= 1e-12 * (k * k + var.abs())
        a = torch.where(flat, 1.0, cov / torch.where(flat, 1.0, var))
        return torch.stack([a, t - a * k]).float()


@dataclass(frozen=True)
class Shift:
    """Scales and shifts for the places where a schedule spares a block.

    Attributes:
        steps: of the trajectories that they were fitted on; others get none.
        at: [2, C] by place; where there is none, features stay as they are.
    """

    steps: int
    at: Mapping[Place, Tensor] = field(default_factory=dict)

    def moved(self, kept: Tensor, place: Place, steps: int) -> Tensor:
        """scale * kept + shift."""
        found = self.at.get(place) if steps == self.steps else None
        return kept if found is None else kept * along(found[0], kept) + along(found[1], kept)

    def write(self, file: str | os.PathLike[str]) -> None:
        """One safetensors file, whole or not at all."""
        named = {"|".join(map(str, place)): t for place, t in self.at.items()}
        labelled.write(file, "cache.shift", named, steps=str(self.steps))

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Shift:
        """Raises ValueError, in one line, where there is no such file or it holds something else."""
        tensors, about = labelled.read(file, "cache.shift", "scales and shifts", "cache.block's fit")
        found = {}
        for key, tensor in tensors.items():
            name, stream, step = key.rsplit("|", 2)
            found[name, stream, int(step)] = tensor
        return cls(int(about["steps"]), found)
