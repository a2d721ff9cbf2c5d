"""The main job: find the fastest recipe that holds a quality, and prove it on prompts and seeds that were not
searched on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hasten import tree
from hasten.bridge.drawing import NotFinite, quiet
from hasten.measure.features import Features, efficientnet_lite0
from hasten.method import Refused
from hasten.recipe import Recipe
from hasten.tune.bench import Benched, Poor, bench
from hasten.tune.search import Found, Search, faults, found
from hasten.tune.subject import Drawn, Task, fingerprint, untouched

SLACK = 0.85
"""Share of the search's speed-up that must be there again when it is verified; less is "slower than predicted"."""


STRIDE, HURRY = 1.05, 1.5
"""Where the proof turned a recipe down, the next to prove is slower by this at least, for one as fast is as doubtful;
and by the second where the budget is spent."""


@dataclass(frozen=True)
class Wanted:
    """What a user asks of `tune`.

    Attributes:
        quality: floor, in [0, 1].
        search, verify: prompts to search on and prompts to prove on; they share none.
        trials: at most.
        budget_seconds: for search and proof together; None for no limit.
    """

    quality: float
    search: tuple[str, ...]
    verify: tuple[str, ...]
    trials: int = 40
    budget_seconds: float | None = None
    seed: int = 0
    batch: int = 8


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        winner: measured on the proof's prompts; None where nothing beat the untouched pipeline.
        rejected: (headline, reason) of candidates that the proof turned down.
        refused: label -> reason, of methods that can't work here.
        failed: (headline, reason) of recipes that the search tried and that broke.
    """

    winner: Benched | None
    plain: tuple[Drawn, Drawn]
    task: Task
    trials: list[Found]
    rejected: list[tuple[str, str]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)


def halves(prompts: Sequence[str], search: int, verify: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every third prompt to search on and the others to prove on, at most so many of each.

    Raises:
        ValueError: fewer than 12 different prompts, too few to tell quality.
    """
    different = list(dict.fromkeys(p.strip() for p in prompts if p.strip()))
    if len(different) < 12:
        raise ValueError(
            f"{len(different)} different prompts are too few to measure quality; give 12 or more, one a line"
        )
    return tuple(different[::3][:search]), tuple(p for i, p in enumerate(different) if i % 3)[:verify]


def tune(
    pipe: Any, name: str, wanted: Wanted, out: Path, console: Console, features: Features | None = None
) -> Outcome:
    """Measures the untouched pipeline, searches, proves. State is kept in `out`/state, so that an interrupted run
    goes on."""
    began = time.monotonic()
    features = features or efficientnet_lite0()
    quiet(pipe)
    state = out / "state"
    state.mkdir(parents=True, exist_ok=True)
    search_task, proof_task = Task.of(wanted.search, wanted.seed), Task.of(wanted.verify, wanted.seed + 1)

    def left() -> float | None:
        return None if wanted.budget_seconds is None else wanted.budget_seconds - (time.monotonic() - began)

    with _progress(console) as bar:
        plain = _untouched(
            bar, "untouched, search", pipe, search_task, features, wanted.batch, state / "search.safetensors"
        )
        proof = _untouched(
            bar, "untouched, proof", pipe, proof_task, features, wanted.batch, state / "proof.safetensors"
        )
        search = Search(pipe, search_task, plain, features, wanted.quality)
        subject = fingerprint(pipe, search_task, features)
        study = _searched(bar, search, wanted, state / "trials.journal", subject, left)
        trials, failed = found(study), [(headline(recipe), why) for recipe, why in faults(study)]
        outcome = Outcome(None, proof, proof_task, trials, refused=search.refused, failed=failed)
        turned_down = math.inf
        for candidate in candidates(trials, wanted.quality):
            rest = left()
            if candidate.speedup.median > turned_down / (STRIDE if rest is None or rest > 0 else HURRY):
                continue
            _prove(bar, pipe, name, candidate, wanted, outcome, features)
            if outcome.winner is not None:
                break
            turned_down = candidate.speedup.median
    return outcome


def candidates(trials: Sequence[Found], floor: float) -> list[Found]:
    """Those that held the floor and beat the untouched pipeline in the search, fastest first."""
    return [t for t in trials if t.quality >= floor and t.speedup.median > 1]


def _prove(
    bar: Progress, pipe: Any, name: str, candidate: Found, wanted: Wanted, outcome: Outcome, features: Features
) -> None:
    task = bar.add_task("proof", total=len(wanted.verify) + 2 * 12, note=headline(candidate.recipe))
    try:
        benched = bench(
            pipe, candidate.recipe, outcome.task, outcome.plain, features, name, floor=wanted.quality,
            tick=lambda n: bar.advance(task, n),
        )  # fmt: skip
    except Poor as reason:
        outcome.rejected.append((headline(candidate.recipe), f"{reason}; {candidate.quality:.3f} in the search"))
        return
    except (NotFinite, Refused, RuntimeError) as reason:
        outcome.rejected.append((headline(candidate.recipe), str(reason)))
        return
    report = benched.report
    speed = report.denoising.median
    if speed < SLACK * candidate.speedup.median or report.denoising.low <= 1:
        why = f"slower than predicted: {report.denoising} where the search saw {candidate.speedup}"
        outcome.rejected.append((headline(candidate.recipe), why))
    else:
        outcome.winner = benched


def _untouched(
    bar: Progress, what: str, pipe: Any, task: Task, features: Features, batch: int, keep: Path
) -> tuple[Drawn, Drawn]:
    line = bar.add_task(what, total=2 * len(task.prompts), note="pictures")
    return untouched(pipe, task, features, batch, lambda n: bar.advance(line, n), keep)


def _searched(
    bar: Progress, search: Search, wanted: Wanted, journal: Path, subject: str, left: Callable[[], float | None]
) -> optuna.Study:
    line = bar.add_task("search", total=wanted.trials, note="recipes")

    def told(study: Any, trial: Any) -> None:
        ended = sum(t.state.is_finished() for t in study.trials)
        good = [f for f in found(study) if f.quality >= wanted.quality]
        note = f"best {good[0].speedup.median:.1f}x at {good[0].quality:.3f}" if good else "none holds the quality yet"
        bar.update(line, completed=ended, note=note)
        rest = left()
        if rest is not None and rest < reserve:
            study.stop()

    # the proof takes about as long as drawing its prompts with a fast recipe and a dozen untouched pictures
    reserve = 0.0 if wanted.budget_seconds is None else 0.25 * wanted.budget_seconds
    rest = left()
    seconds = None if rest is None else max(1.0, rest - reserve)
    with torch._dynamo.config.patch(
        recompile_limit=256, accumulated_recompile_limit=4096
    ):  # every trial may be a new shape
        return search.run(journal, subject, wanted.trials, seconds, wanted.seed, told)


def headline(r: Recipe) -> str:
    """A recipe in a few words: solver, steps, grid, methods (without their room where no other is called so)."""
    grid = r.grid if isinstance(r.grid, str) else next(iter(r.grid)) if isinstance(r.grid, dict) else "times"
    solver = r.solving()
    return " ".join([f"{solver.name if solver else None} {r.steps} {grid}", *(_settings(m) for m in r.all_methods())])


def _settings(m: Any) -> str:
    dumped = {k: round(v, 2) if isinstance(v, float) else v for k, v in m.model_dump().items()}
    short = m.label().split(".")[1]
    alike = sum(label.split(".")[1] == short for label in tree.methods())
    return (short if alike == 1 else m.label()) + (
        "(" + ",".join(str(v) for v in dumped.values()) + ")" if dumped else ""
    )


def table(outcome: Outcome, most: int = 8) -> Table:
    """The search's best, beside each other: what they are, how fast, how good."""
    every = outcome.trials
    front = [t for t in every if not any(o.speedup.median > t.speedup.median and o.quality > t.quality for o in every)]
    title = "fastest recipes at each quality, as the search saw them"
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    view.add_column("recipe", min_width=20)
    for column in ("calls", "s an image", "speed-up", "quality", "PSNR", "Fréchet"):
        view.add_column(column, justify="right", no_wrap=True)
    for t in front[:most]:
        near = f"{t.psnr_db:.1f} dB" if math.isfinite(t.psnr_db) else "equal"
        view.add_row(
            headline(t.recipe), str(t.calls), f"{t.seconds.median:.3f}", f"{t.speedup}", f"{t.quality:.3f}", near,
            f"{t.frechet:.0f}",
        )  # fmt: skip
    return view


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip
