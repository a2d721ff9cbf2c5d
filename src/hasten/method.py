"""A method: frozen settings with ranges and one verb, `apply`; what it declares gives its order and its conflicts."""

from __future__ import annotations

import enum
from itertools import combinations
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from hasten.patch import Patch


class Stage(enum.IntEnum):
    """Methods are applied in this order, so a later one wraps an earlier one. COMPILE comes before CACHE: caches act at
    block borders, and what is compiled is the block."""

    ADAPT = 1
    PRUNE = 2
    QUANTIZE = 3
    ATTENTION = 4
    TOKENS = 5
    COMPILE = 6
    CACHE = 7
    GUIDANCE = 8
    PARALLEL = 9


class Part(enum.StrEnum):
    """What a method may rewrite. Two methods that write one part conflict."""

    PRECISION = "precision"
    LINEARS = "linears"
    ATTENTION = "attention"
    TOKENS = "tokens"
    GRAPH = "graph"
    SCHEDULE = "schedule"
    BATCH = "batch"
    GUIDANCE = "guidance"
    WORDS = "words"


class Refused(ValueError):
    """A method cannot work on this network, device or machine; the text says why and what to do."""


class Method(BaseModel):
    """Base of every method. A subclass is one file of a method room; its fields carry ranges, which give validation,
    the documentation and the tuner's space.

    Attributes:
        stage: when it is applied.
        writes: what it rewrites.
        systems: ids of the catalogue that it implements.
        neutral: settings at which it changes nothing, bit for bit; None where it has none.
        saves: it saves work, so the tuner may try it; else it changes what is drawn, which is the user's choice, or
            needs what a fit finds.
        sure: worth having wherever it works: the tuner begins with it.
        from_tokens: places of the picture in one attention below which it cannot pay: the tuner leaves it out there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stage: ClassVar[Stage]
    writes: ClassVar[frozenset[Part]]
    systems: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[dict[str, Any] | None] = None
    saves: ClassVar[bool] = True
    sure: ClassVar[bool] = False
    from_tokens: ClassVar[int] = 0

    def apply(self, model: nn.Module) -> Patch:
        """Edits `model` in place; the patch takes it back. Raises Refused, with nothing changed, where it can't
        work."""
        raise TypeError(f"{type(self).__name__} has no apply")

    def is_neutral(self) -> bool:
        """Whether it is set to change nothing."""
        return self.neutral is not None and all(getattr(self, k) == v for k, v in self.neutral.items())

    @classmethod
    def label(cls) -> str:
        """Its name in a recipe: room and file, "cache.interval"."""
        return cls.__module__.removeprefix("hasten.")


def in_memory(method: Method, model: nn.Module) -> None:
    """Raises Refused where weights wait elsewhere between calls: for methods that read them themselves."""
    if any(p.is_meta for p in model.parameters()):
        raise Refused(
            f"{method.label()} reads weights of {type(model).__name__}, which are offloaded: leave it out, or load the"
            " model without offload"
        )


def conflict(methods: list[Method]) -> str | None:
    """The first pair that writes one part, as a sentence; None where all compose."""
    for a, b in combinations(methods, 2):
        if both := a.writes & b.writes:
            parts = " and ".join(sorted(both))
            return f"{a.label()} and {b.label()} both write the {parts}; keep one of them"
    return None


def apply_all(methods: list[Method], model: nn.Module) -> list[tuple[Method, Patch]]:
    """Applies in order of stage; where one is refused, those before are taken back. One that changes nothing, though
    it is not set to, is refused."""
    done: list[tuple[Method, Patch]] = []
    try:
        for m in sorted(methods, key=lambda m: m.stage):
            done.append((m, m.apply(model)))
            if not done[-1][1].sites and not m.is_neutral():
                raise Refused(f"{m.label()} found nothing to change in {type(model).__name__}: leave it out")
    except BaseException:
        for _, patch in reversed(done):
            patch.remove()
        raise
    return done
