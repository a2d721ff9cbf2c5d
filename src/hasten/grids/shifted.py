"""Even times, pushed towards noise."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hasten.path import Path


def shifted(
    path: Path,
    steps: int,
    *,
    shift: Annotated[float, Field(gt=0, le=20, json_schema_extra={"log": True, "low": 0.3})] = 3.0,
) -> list[float]:
    """t -> s t / (1 + (s - 1) t) of even times; s = 1 leaves them. Esser et al. 2024, arXiv:2403.03206 eq. 23."""
    even = [1 - i / steps for i in range(1, steps + 1)]
    return [1.0, *(shift * t / (1 + (shift - 1) * t) for t in even)]  # 1 exactly: rounding could lead past it
