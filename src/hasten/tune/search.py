"""The search: Optuna over recipes, two goals (speed-up and quality), on disk, so that an interrupted one goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor, nn

from hasten import tree
from hasten.anatomy import Block, anatomy
from hasten.api import accelerate
from hasten.bridge.drawing import NotFinite, draw, quiet, twin
from hasten.bridge.pipelines import networks
from hasten.bridge.stopwatch import Stopwatch
from hasten.measure import fidelity
from hasten.measure.features import Features
from hasten.measure.frechet import frechet_small
from hasten.measure.quality import Quality, quality
from hasten.measure.timing import Spread
from hasten.method import Refused
from hasten.patch import Patch
from hasten.recipe import Recipe
from hasten.tune.space import refusals, starts, suggest
from hasten.tune.subject import Drawn, Task, drawn

FAULTS = (NotFinite, Refused, ValueError, RuntimeError, torch.OutOfMemoryError)
"""What fails a trial and not the search."""


EARLY = 6
"""Prompts after which a trial far below the floor is given up."""


@dataclass(frozen=True)
class Found:
    """One trial that ended, as the search saw it.

    Attributes:
        speedup, seconds: of the denoising, picture by picture.
        calls: of the network, a picture.
        psnr_db: to the untouched pictures of the same seeds, median.
        frechet: from an untouched run with other seeds.
    """

    recipe: Recipe
    speedup: Spread
    seconds: Spread
    quality: float
    calls: int
    psnr_db: float
    frechet: float


@contextmanager
def counted(net: nn.Module) -> Iterator[set[int]]:
    """Within, the set gets how many tokens of the picture the blocks of a network attend to."""
    seen: set[int] = set()

    def note(block: Block) -> Callable[..., Any]:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            seen.add(block.inputs(args, kwargs).x.shape[1])
            return forward(*args, **kwargs)

        return around

    with Patch() as patch:
        for block in anatomy(net).blocks:
            if any(site.kind in ("self", "joint") for site in block.attentions):
                patch.wrap(block.module, note(block))
        yield seen


class Search:
    """Tries recipes on a twin of the pipeline.

    Attributes:
        refused: label -> reason, of the methods that can't work on this network or machine.
    """

    def __init__(self, pipe: Any, task: Task, plain: tuple[Drawn, Drawn], features: Features, floor: float) -> None:
        self.pipe, self.task, self.plain, self.features, self.floor = pipe, task, plain, features, floor
        self.fast = quiet(twin(pipe))
        watch = Stopwatch()
        with watch.install(pipe), counted(next(iter(networks(pipe).values()))) as tokens:
            list(draw(pipe, task.prompts[:1], task.seeds[:1]))
        self.refused = refusals(next(iter(networks(self.fast).values())), max(tokens, default=0))
        self.labels = [label for label in tree.methods() if label not in self.refused]
        self.calls = watch.calls
        self.guided = bool(getattr(pipe, "do_classifier_free_guidance", True))

    def run(
        self,
        journal: Path,
        subject: str,
        trials: int,
        seconds: float | None,
        seed: int,
        told: Callable[[optuna.Study, FrozenTrial], None],
    ) -> optuna.Study:
        """Up to `trials` trials in all, those of an earlier, interrupted run in `journal` on the same `subject`
        included, within `seconds`."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial is marked, and the search goes on
        study = optuna.create_study(
            study_name=subject, directions=["maximize", "maximize"], load_if_exists=True,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8),
        )  # fmt: skip
        if not study.trials:
            for start in starts(self.labels, self.calls):
                study.enqueue_trial(start)
        left = trials - sum(t.state.is_finished() for t in study.trials)
        if left > 0:
            study.optimize(
                self._trial, n_trials=left, timeout=seconds, callbacks=[told], catch=FAULTS,
            )  # fmt: skip
        return study

    def _trial(self, trial: optuna.Trial) -> tuple[float, float]:
        recipe = suggest(trial, self.labels, self.calls, self.guided)
        trial.set_user_attr("recipe", recipe.to_dict())
        try:
            return self._tried(trial, recipe)
        except FAULTS as fault:
            trial.set_user_attr("fault", " ".join(str(fault).split())[:300] or type(fault).__name__)
            raise

    def _tried(self, trial: optuna.Trial, recipe: Recipe) -> tuple[float, float]:
        """Speed-up of the denoising and quality, from the same pictures; given up early where quality is hopeless."""
        one = (self.task.prompts[:1], self.task.seeds[:1])
        slow, fast = Stopwatch(), Stopwatch()
        seconds: list[float] = []
        with accelerate(self.fast, recipe), slow.install(self.pipe), fast.install(self.fast):
            list(draw(self.fast, *one))  # compiles; not counted
            early = self._draw(slice(0, EARLY), fast, seconds)
            likely = self._quality(early.features, 50)
            if likely.high < self.floor - 0.1:
                raise optuna.TrialPruned(f"quality {likely} on {EARLY} prompts")
            list(draw(self.pipe, *one))  # in the middle, so that a machine that slows down slows both
            more = len(self.task.prompts) > EARLY
            made = early.joined(self._draw(slice(EARLY, None), fast, seconds)) if more else early
        value = self._quality(made.features, 0)
        a, b = self.plain
        speedup = Spread.of([slow.seconds / s for s in seconds])
        trial.set_user_attr("speedup", speedup.to_dict())
        trial.set_user_attr("seconds", Spread.of(seconds).to_dict())
        trial.set_user_attr("calls", fast.calls)
        trial.set_user_attr("psnr_db", float(fidelity.psnr(made.pictures, a.pictures).median()))
        trial.set_user_attr("frechet", frechet_small(made.features, b.features))
        return speedup.median, value.value

    def _draw(self, which: slice, watch: Stopwatch, seconds: list[float]) -> Drawn:
        """Some of the task's pictures; notes the denoising time of each."""
        return drawn(
            self.fast, self.task.prompts[which], self.task.seeds[which], self.features, 1,
            lambda _: seconds.append(watch.seconds),
        )  # fmt: skip

    def _quality(self, made: Tensor, resamples: int) -> Quality:
        a, b = (p.features[: len(made)] for p in self.plain)
        return quality(a, b, made, torch.Generator().manual_seed(0), resamples=resamples)


def found(study: optuna.Study) -> list[Found]:
    """The trials that ended, fastest first."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted((_read(t) for t in done), key=lambda f: -f.speedup.median)


def faults(study: optuna.Study) -> list[tuple[Recipe, str]]:
    """The trials that failed, and why."""
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    told = [t.user_attrs for t in failed if "fault" in t.user_attrs]
    return [(Recipe.from_dict(t["recipe"]), t["fault"]) for t in told]


def _read(trial: FrozenTrial) -> Found:
    seen = dict(trial.user_attrs)
    recipe = Recipe.from_dict(seen.pop("recipe"))
    speedup, seconds = Spread(**seen.pop("speedup")), Spread(**seen.pop("seconds"))
    return Found(recipe, speedup, seconds, trial.values[1], **seen)
