"""The search: Optuna over recipes, two goals (speed-up and quality), on disk, so that an interrupted one goes on."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from hasten import tree
from hasten.api import accelerate
from hasten.bridge.drawing import NotFinite, draw, quiet, twin
from hasten.bridge.pipelines import networks
from hasten.bridge.stopwatch import Stopwatch
from hasten.measure.features import Features
from hasten.measure.quality import Quality, quality
from hasten.method import Refused
from hasten.recipe import Recipe
from hasten.tune.space import refusals, starts, suggest
from hasten.tune.subject import Drawn, Task

EARLY = 6
"""Prompts after which a trial far below the floor is given up."""


@dataclass(frozen=True)
class Found:
    """One trial that ended: a recipe with the speed-up of its denoising and its quality, as the search saw them."""

    recipe: Recipe
    speedup: float
    seconds: float
    quality: float


class Search:
    """Tries recipes on a twin of the pipeline.

    Attributes:
        refused: label -> reason, of the methods that can't work on this network or machine.
    """

    def __init__(self, pipe: Any, task: Task, plain: tuple[Drawn, Drawn], features: Features, floor: float) -> None:
        self.pipe, self.task, self.plain, self.features, self.floor = pipe, task, plain, features, floor
        self.fast = quiet(twin(pipe))
        self.refused = refusals(next(iter(networks(self.fast).values())))
        self.labels = [label for label in tree.methods() if label not in self.refused]
        watch = Stopwatch()
        with watch.install(pipe):
            list(draw(pipe, task.prompts[:1], task.seeds[:1]))
        self.calls = watch.calls
        self.guided = bool(getattr(pipe, "do_classifier_free_guidance", True))

    def run(
        self,
        journal: Path,
        trials: int,
        seconds: float | None,
        seed: int,
        told: Callable[[optuna.Study, FrozenTrial], None],
    ) -> optuna.Study:
        """Up to `trials` trials in all, those of an earlier, interrupted run in `journal` included, within
        `seconds`."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed trial is marked, and the search goes on
        study = optuna.create_study(
            study_name="hasten", directions=["maximize", "maximize"], load_if_exists=True,
            storage=JournalStorage(JournalFileBackend(str(journal))),
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8),
        )  # fmt: skip
        if not study.trials:
            for start in starts(self.labels, self.calls):
                study.enqueue_trial(start)
        left = trials - sum(t.state.is_finished() for t in study.trials)
        if left > 0:
            study.optimize(
                self._trial, n_trials=left, timeout=seconds, callbacks=[told],
                catch=(NotFinite, Refused, ValueError, RuntimeError, torch.OutOfMemoryError),
            )  # fmt: skip
        return study

    def _trial(self, trial: optuna.Trial) -> tuple[float, float]:
        """Speed-up of the denoising and quality, from the same pictures; given up early where quality is hopeless."""
        recipe = suggest(trial, self.labels, self.calls, self.guided)
        trial.set_user_attr("recipe", recipe.to_dict())
        one = (self.task.prompts[:1], self.task.seeds[:1])
        slow, fast = Stopwatch(), Stopwatch()
        seconds: list[float] = []
        with accelerate(self.fast, recipe), slow.install(self.pipe), fast.install(self.fast):
            list(draw(self.fast, *one))  # compiles; not counted
            early = self._draw(slice(0, EARLY), fast, seconds)
            likely = self._quality(early, 50)
            if likely.high < self.floor - 0.1:
                raise optuna.TrialPruned(f"quality {likely} on {EARLY} prompts")
            list(draw(self.pipe, *one))  # in the middle, so that a machine that slows down slows both
            value = self._quality(early + self._draw(slice(EARLY, None), fast, seconds), 0)
        trial.set_user_attr("seconds", statistics.median(seconds))
        trial.set_user_attr("quality", value.to_dict())
        return slow.seconds / statistics.median(seconds), value.value

    def _draw(self, which: slice, watch: Stopwatch, seconds: list[float]) -> list[Tensor]:
        """Features of some of the task's pictures; notes the denoising time of each."""
        found = []
        for picture in draw(self.fast, self.task.prompts[which], self.task.seeds[which]):
            seconds.append(watch.seconds)
            found.append(self.features(picture))
        return found

    def _quality(self, made: list[Tensor], resamples: int) -> Quality:
        a, b = (p.features[: len(made)] for p in self.plain)
        return quality(a, b, torch.cat(made), torch.Generator().manual_seed(0), resamples=resamples)


def found(study: optuna.Study) -> list[Found]:
    """The trials that ended, fastest first."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    read = [
        Found(Recipe.from_dict(t.user_attrs["recipe"]), t.values[0], t.user_attrs["seconds"], t.values[1]) for t in done
    ]
    return sorted(read, key=lambda f: -f.speedup)
