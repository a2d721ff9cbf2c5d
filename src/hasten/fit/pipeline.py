"""Fits a recipe to an ordinary pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hasten.bridge.replay import frozen, replay
from hasten.fit.fit import Effort, Fitted, fit
from hasten.solvers.declare import Solver


def fit_pipeline(
    pipe: Any, prompts: Sequence[str], steps: int, solver: Solver | None = None, *, seed: int = 0,
    effort: Effort | None = None, tick: Callable[[int], None] = lambda n: None, **call: Any,
) -> Fitted:  # fmt: skip
    """Times, and without `solver` weights, for `steps` calls of this pipeline on these prompts' trajectories.

    A third of the prompts judges what was fitted to the others. The pipeline is not changed. Guidance is the pipeline's
    default, or what `call` says (any argument of `pipe(...)`); a fit holds for that scale.

    Args:
        prompts: 3 or more, run as one batch.

    Raises:
        CannotReplay: the pipeline does more between steps than call its network and guide.
        CannotFit: prompts are too few, or the solver can't be fitted.
    """
    rngs = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with frozen(pipe):
        seen = replay(pipe, prompt=list(prompts), generator=rngs, **call)
        rng = torch.Generator().manual_seed(seed)
        held = len(prompts) // 3
        return fit(seen.denoise, seen.x, seen.path, steps, solver, held=held, rng=rng, effort=effort, tick=tick)
