"""Pictures from any pipeline, and a second pipeline of the same parts to change."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.bridge.pipelines import networks


class NotFinite(ArithmeticError):
    """A pipeline gave NaN or infinity."""


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], batch: int = 1, **call: Any) -> Iterator[Tensor]:
    """Batches of pictures, [b, 3, H, W] float32 in [0, 1] on the CPU; picture i is of prompts[i] from seeds[i]
    whatever the batch. Of a video, its middle frame. A pipeline that takes no prompt is only told how many.

    Raises:
        NotFinite: a picture holds NaN or infinity.
        ValueError: the pipeline gives no pictures.
    """
    for out in _batches(pipe, prompts, seeds, batch, output_type="pt", **call):
        pictures = getattr(out, "frames", getattr(out, "images", None))
        if pictures is None:
            raise ValueError(f"{type(pipe).__name__} gives no pictures, which is what hasten measures")
        if pictures.ndim == 5:
            pictures = pictures[:, pictures.shape[1] // 2]
        pictures = pictures.float().cpu()
        if not bool(pictures.isfinite().all()):
            raise NotFinite("the pictures hold NaN or infinity")
        yield pictures


def latents(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], batch: int = 8, **call: Any) -> Tensor:
    """What the pipeline ends with before it is decoded, [N, ...] float32 on the CPU; row i is of prompts[i] from
    seeds[i]. Raises NotFinite where it holds NaN or infinity."""
    made = []
    for out in _batches(pipe, prompts, seeds, batch, output_type="latent", **call):
        kind = next(k for k in ("frames", "images", "audios") if hasattr(out, k))
        made.append(getattr(out, kind).float().cpu())
        if not bool(made[-1].isfinite().all()):
            raise NotFinite("the latents hold NaN or infinity")
    return torch.cat(made)


def _batches(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], batch: int, **call: Any) -> Iterator[Any]:
    """What the pipeline returns of each batch."""
    known = inspect.signature(type(pipe).__call__).parameters
    for i in range(0, len(prompts), batch):
        rngs = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        words = list(prompts[i : i + batch])
        what = {"prompt": words} if "prompt" in known else {"batch_size": len(words)} if "batch_size" in known else {}
        yield pipe(generator=rngs, **({} if "prompt_embeds" in call else what), **call)


def twin(pipe: Any) -> Any:
    """A pipeline with networks and scheduler of its own and the other parts shared: one to change, one to compare
    with."""
    _, further = pipe._get_signature_keys(type(pipe))
    parts = pipe.components | {k: pipe.config[k] for k in further if k in pipe.config}
    for name in (*networks(pipe), "scheduler"):
        parts[name] = copy.deepcopy(parts[name])
    other = type(pipe)(**parts)
    other._progress_bar_config = dict(getattr(pipe, "_progress_bar_config", {}))
    return other


def quiet(pipe: Any) -> Any:
    """The pipeline without its own progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
