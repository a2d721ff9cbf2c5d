"""Autoguidance: a good network guided by a bad version of itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hasten.denoiser import Denoiser
from hasten.guidance.cfg import cfg


def autoguidance(
    main: Denoiser, worse: Denoiser, *,
    scale: Annotated[float, Field(ge=1, le=20)] = 2.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoiser:  # fmt: skip
    """worse + scale (main - worse): away from what a smaller or less trained network of the same condition says.

    The errors of `main` lie in the direction of those of `worse`, only smaller; so the step from one to the other,
    prolonged, takes out error without the loss of variety that a step away from "no condition" brings. The same
    arithmetic as classifier-free guidance. scale = 1 is `main` alone.

    Karras et al. 2024, arXiv:2406.02507 sec. 4. Two network calls, the second of the cheaper network; one at scale 1
    and outside `interval`.
    """
    return cfg(main, worse, scale=scale, interval=interval)
