"""What is tuned: a pipeline, prompts, and what the untouched pipeline makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from hasten.atomic import write_bytes_atomically
from hasten.bridge.drawing import draw
from hasten.measure.features import Features

Tick = Callable[[int], None]
"""Told how many pictures were just made."""


@dataclass(frozen=True)
class Drawn:
    """Pictures, [N, 3, H, W] in [0, 1], and their features, [N, D]."""

    pictures: Tensor
    features: Tensor


@dataclass(frozen=True)
class Task:
    """Prompts with two seeds each: one that recipe and untouched pipeline share, one for an untouched run apart."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    other_seeds: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[str], seed: int) -> Task:
        """Seeds that follow from `seed`; tasks of seeds that differ share none."""
        rng = torch.Generator().manual_seed(seed)
        drawn = torch.randint(2**40, (2, len(prompts)), generator=rng)
        return cls(tuple(prompts), tuple(drawn[0].tolist()), tuple(drawn[1].tolist()))


def drawn(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], features: Features, batch: int, tick: Tick) -> Drawn:
    """Draws and reads every picture."""
    pictures, found = [], []
    for part in draw(pipe, prompts, seeds, batch):
        pictures.append(part)
        found.append(features(part))
        tick(len(part))
    return Drawn(torch.cat(pictures), torch.cat(found))


def untouched(
    pipe: Any, task: Task, features: Features, batch: int, tick: Tick, keep: Path | None = None
) -> tuple[Drawn, Drawn]:
    """What the untouched pipeline makes of the task: with the shared seeds, and with the others. Where `keep` is
    given it is kept there, and read back by a run that is resumed; a file of another task or broken is drawn anew."""
    if keep is not None and keep.exists():
        try:
            t = load_file(keep)
            if t["seeds"].tolist() == [*task.seeds, *task.other_seeds]:
                tick(2 * len(task.prompts))
                return Drawn(t["a"], t["fa"]), Drawn(t["b"], t["fb"])
        except (OSError, ValueError, KeyError, RuntimeError):
            pass
    a = drawn(pipe, task.prompts, task.seeds, features, batch, tick)
    b = drawn(pipe, task.prompts, task.other_seeds, features, batch, tick)
    if keep is not None:
        seeds = torch.tensor([*task.seeds, *task.other_seeds])
        kept = {"a": a.pictures, "fa": a.features, "b": b.pictures, "fb": b.features, "seeds": seeds}
        write_bytes_atomically(keep, save({k: v.contiguous() for k, v in kept.items()}))
    return a, b
