"""Even times, pushed towards noise the more, the larger the picture."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hasten.grids.shifted import shifted
from hasten.path import Path
from hasten.paths.shifted import shift_of


def dynamic_shift(
    path: Path, steps: int, *,
    tokens: Annotated[int, Field(ge=1, le=1 << 20, json_schema_extra={"log": True, "low": 64, "high": 16384})] = 4096,
    base_shift: Annotated[float, Field(ge=-3, le=5, json_schema_extra={"low": 0, "high": 1})] = 0.5,
    max_shift: Annotated[float, Field(ge=-3, le=5, json_schema_extra={"low": 0.5, "high": 3})] = 1.15,
) -> list[float]:  # fmt: skip
    """`shifted` by exp(mu), mu linear in the number of tokens: `base_shift` at 256, `max_shift` at 4096 (1024 pixels a
    side for Flux). `hasten.paths.shifted.shift_of` has the source."""
    return shifted(path, steps, shift=shift_of(tokens, base_shift, max_shift))
