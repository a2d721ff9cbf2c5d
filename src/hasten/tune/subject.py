"""What is tuned: a pipeline, prompts, and what the untouched pipeline makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

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

    def joined(self, more: Drawn) -> Drawn:
        """These, then `more`."""
        return Drawn(torch.cat([self.pictures, more.pictures]), torch.cat([self.features, more.features]))


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


def fingerprint(pipe: Any, task: Task, features: Features) -> str:
    """What results can be kept under: changes with the pipeline (classes, configurations, a sample of each weight),
    the prompts and seeds, and the features."""
    found = sha256(repr((type(pipe).__name__, task, features.name)).encode())
    for name, part in sorted(pipe.components.items()):
        found.update(f"{name} {type(part).__name__} {getattr(part, 'config', '')}".encode())
        for p in part.parameters() if isinstance(part, nn.Module) else ():
            flat = p.detach().flatten()
            found.update(repr((p.shape, p.dtype, flat[:: max(1, len(flat) // 16)].tolist())).encode())
    return found.hexdigest()[:16]


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
    given they are kept there, and read back by a run that is resumed; a file of another subject or broken is drawn
    anew."""
    subject = fingerprint(pipe, task, features)
    if keep is not None and keep.exists():
        try:
            with safe_open(keep, "pt") as file:
                if file.metadata()["subject"] == subject:
                    tick(2 * len(task.prompts))
                    a, fa, b, fb = (file.get_tensor(name) for name in ("a", "fa", "b", "fb"))
                    return Drawn(a, fa), Drawn(b, fb)
        except (OSError, KeyError, TypeError, SafetensorError):
            pass
    a = drawn(pipe, task.prompts, task.seeds, features, batch, tick)
    b = drawn(pipe, task.prompts, task.other_seeds, features, batch, tick)
    if keep is not None:
        kept = {"a": a.pictures, "fa": a.features, "b": b.pictures, "fb": b.features}
        write_bytes_atomically(keep, save({k: v.contiguous() for k, v in kept.items()}, {"subject": subject}))
    return a, b
