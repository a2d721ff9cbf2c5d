"""Pictures from any pipeline, and a second pipeline of the same parts to change."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.bridge.pipelines import networks


class NotFinite(ArithmeticError):
    """A pipeline gave NaN or infinity."""


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], batch: int = 1, **call: Any) -> Iterator[Tensor]:
    """Batches of pictures, [b, 3, H, W] float32 in [0, 1] on the CPU; picture i is of prompts[i] from seeds[i]
    whatever the batch. Of a video, its middle frame.

    Raises:
        NotFinite: a picture holds NaN or infinity.
    """
    for i in range(0, len(prompts), batch):
        rngs = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        out = pipe(prompt=list(prompts[i : i + batch]), generator=rngs, output_type="pt", **call)
        pictures = out.frames if hasattr(out, "frames") else out.images
        if pictures.ndim == 5:
            pictures = pictures[:, pictures.shape[1] // 2]
        pictures = pictures.float().cpu()
        if not bool(pictures.isfinite().all()):
            raise NotFinite("the pictures hold NaN or infinity")
        yield pictures


def twin(pipe: Any) -> Any:
    """A pipeline with networks and scheduler of its own and the other parts shared: one to change, one to compare
    with."""
    parts = dict(pipe.components)
    for name in (*networks(pipe), "scheduler"):
        parts[name] = copy.deepcopy(parts[name])
    other = type(pipe)(**parts)
    other._progress_bar_config = dict(getattr(pipe, "_progress_bar_config", {}))
    return other


def quiet(pipe: Any) -> Any:
    """The pipeline without its own progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
