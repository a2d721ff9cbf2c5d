"""Two branches, as halves of a batch, the unconditional first, or as two calls; and what networks return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.method import Refused
from hasten.moment import Moment

CONTEXT = "encoder_hidden_states"
"""Under this name some networks of videos are given a row for every frame of every sample."""


def half(value: Any, size: int) -> Any:
    """The second, conditional half of every tensor whose batch is `size`, and of a context of so many rows a sample;
    all else stays."""
    if isinstance(value, Tensor):
        return value[size // 2 :] if value.ndim > 0 and len(value) == size else value
    if isinstance(value, dict):
        return {k: half(v, context(v, size) if k == CONTEXT else size) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(half(v, size) for v in value)
    return value


def context(value: Any, size: int) -> int:
    """Rows of a context of a batch of `size`: `size`, or a multiple of it."""
    return len(value) if isinstance(value, Tensor) and value.ndim > 1 and len(value) % size == 0 else size


def batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of a network's first tensor input."""
    return len(next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.ndim > 1))


def doubled(value: Any) -> Any:
    """Every tensor twice along the batch, in the container it came in."""
    if isinstance(value, Tensor):
        return torch.cat([value, value])
    if isinstance(value, dict):
        return type(value)(**{k: doubled(v) for k, v in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(doubled(v) for v in value)
    return value


def swapped(value: Any, size: int) -> Any:
    """The halves of every tensor whose batch is `size` in the other order; all else stays."""
    if isinstance(value, Tensor):
        return value.roll(size // 2, 0) if value.ndim > 0 and len(value) == size else value
    if isinstance(value, dict):
        turned = {k: swapped(v, size) for k, v in value.items()}
        return turned if type(value) is dict else type(value)(**turned)
    if isinstance(value, list | tuple):
        return type(value)(swapped(v, size) for v in value)
    return value


def split(both: Tensor) -> tuple[Tensor, Tensor]:
    """(unconditional, conditional) halves of [2 B, ...]. Raises Refused for an odd batch."""
    if len(both) % 2:
        raise Refused(f"a batch of {len(both)} rows has no two halves; guide in a pipeline of two branches")
    return both[: len(both) // 2], both[len(both) // 2 :]


@dataclass
class Conditional:
    """What the conditional call gave, until the unconditional call of the same evaluation takes it."""

    moment: Moment | None = None
    out: Any = None

    def keep(self, here: Moment, out: Any) -> None:
        self.moment, self.out = here, out

    def take(self, here: Moment) -> Any:
        """What was kept at this evaluation, once; else None."""
        if here.since(self.moment) != 0:
            return None
        out, self.moment, self.out = self.out, None, None
        return out


def said(out: Any) -> Tensor:
    """The prediction in what a network returns: a tensor, a tuple or a mapping that begins with one. Raises Refused
    where there is none."""
    first = out if isinstance(out, Tensor) else next(iter(out.values() if isinstance(out, dict) else out))
    if not isinstance(first, Tensor):
        raise Refused(f"this network answers with a {type(first).__name__}; guidance works on those that give a tensor")
    return first


def instead(out: Any, new: Tensor) -> Any:
    """`out` with `new` in the place of its prediction."""
    if isinstance(out, Tensor):
        return new
    if isinstance(out, dict):
        return type(out)(**{**out, next(iter(out)): new})
    return (new, *out[1:])
