"""A recipe against the untouched pipeline: speed in interleaved pairs beside quality, both from one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.api import accelerate
from hasten.bridge.drawing import draw, quiet, twin
from hasten.bridge.pipelines import networks
from hasten.bridge.stopwatch import Stopwatch
from hasten.measure import fidelity, flops, memory
from hasten.measure.features import Features
from hasten.measure.frechet import frechet_small
from hasten.measure.kernel import kernel_distance
from hasten.measure.machine import machine
from hasten.measure.quality import quality
from hasten.measure.report import Cost, Report
from hasten.measure.timing import Spread, cold, compare
from hasten.method import Part
from hasten.recipe import Recipe
from hasten.tune.subject import Drawn, Task, Tick, drawn


class Poor(ArithmeticError):
    """A recipe's quality is below the floor that was asked for."""


@dataclass(frozen=True)
class Benched:
    """A report and the pictures it was made from."""

    report: Report
    recipe_pictures: Tensor


def bench(
    pipe: Any, recipe: Recipe, task: Task, plain: tuple[Drawn, Drawn], features: Features, name: str, *,
    pairs: int = 10, floor: float = 0.0, tick: Tick = lambda n: None,
) -> Benched:  # fmt: skip
    """Measures `recipe` on a twin of `pipe`, which stays untouched.

    Args:
        plain: what the untouched pipeline made of the task (`subject.untouched`).
        name: of the pipeline, for the report.
        pairs: of untouched and recipe, one picture each, in turn.
        floor: of quality; below it nothing is timed.

    Raises:
        Poor: the quality is below the floor.
        NotFinite: the recipe's pictures are broken.
        Refused: one of its methods can't work here.
    """
    fast = quiet(twin(pipe))
    a, b = plain
    with accelerate(fast, recipe):
        made = drawn(fast, task.prompts, task.seeds, features, 1, tick)
        held = quality(a.features, b.features, made.features, torch.Generator().manual_seed(0))
        if held.value < floor:
            raise Poor(f"quality {held} on new prompts and seeds, below {floor}")
        slow_watch, fast_watch = Stopwatch(), Stopwatch()
        with slow_watch.install(pipe), fast_watch.install(fast):
            slow_seconds: list[float] = []
            fast_seconds: list[float] = []
            paired = compare(
                _once(pipe, task, slow_watch, slow_seconds, tick),
                _once(fast, task, fast_watch, fast_seconds, tick),
                pairs,
            )
            one = (task.prompts[:1], task.seeds[:1])
            slow_peak = memory.peak(lambda: list(draw(pipe, *one)), networks(pipe).values())
            fast_peak = memory.peak(lambda: list(draw(fast, *one)), networks(fast).values())
            calls = slow_watch.calls, fast_watch.calls
    slow_seconds, fast_seconds = slow_seconds[-pairs:], fast_seconds[-pairs:]
    report = Report(
        recipe=recipe.to_dict(), pipeline=name,
        untouched=Cost(
            seconds=Spread.of(paired.before), denoising_seconds=Spread.of(slow_seconds), calls=calls[0],
            first_call_seconds=paired.first_before, flops=flops.count(lambda: list(draw(pipe, *one))),
            activation_bytes=slow_peak.activations, weight_bytes=slow_peak.weights,
        ),
        tuned=Cost(
            seconds=Spread.of(paired.after), denoising_seconds=Spread.of(fast_seconds), calls=calls[1],
            first_call_seconds=_first(pipe, recipe, one), flops=_flops(fast, recipe, one),
            activation_bytes=fast_peak.activations, weight_bytes=fast_peak.weights,
        ),
        end_to_end=paired.speedup,
        denoising=Spread.of([s / f for s, f in zip(slow_seconds, fast_seconds, strict=True)]),
        quality=held,
        psnr_db=float(fidelity.psnr(made.pictures, a.pictures).median()),
        feature_distance=float(fidelity.feature_distance(made.features, a.features).mean()),
        frechet=frechet_small(made.features, b.features), frechet_untouched=frechet_small(a.features, b.features),
        kernel=kernel_distance(made.features, b.features), kernel_untouched=kernel_distance(a.features, b.features),
        features=features.name, machine=machine(),
    )  # fmt: skip
    return Benched(report, made.pictures)


def _first(pipe: Any, recipe: Recipe, one: tuple[Any, Any]) -> float:
    other = quiet(twin(pipe))
    with cold(), accelerate(other, recipe):
        began = time.perf_counter()
        list(draw(other, *one))
        return time.perf_counter() - began


def _once(pipe: Any, task: Task, watch: Stopwatch, seconds: list[float], tick: Tick) -> Callable[[], None]:
    """One picture a call, the prompts in turn; notes its denoising time."""

    def call() -> None:
        i = len(seconds) % len(task.prompts)
        list(draw(pipe, task.prompts[i : i + 1], task.seeds[i : i + 1]))
        seconds.append(watch.seconds)
        tick(1)

    return call


def _flops(bare: Any, recipe: Recipe, one: tuple[Any, Any]) -> int | None:
    """Of a picture, counted without what the counter can't see through: compilation leaves the operations as they
    are, int8 products are unknown to it (None)."""
    if any(Part.LINEARS in m.writes for m in recipe.methods):
        return None
    seen = recipe.model_copy(update={"methods": tuple(m for m in recipe.methods if Part.GRAPH not in m.writes)})
    with accelerate(bare, seen):
        return flops.count(lambda: list(draw(bare, *one)))
