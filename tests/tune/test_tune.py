"""The search never tries what conflicts, survives faults and interruption, and reports what it did not search on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from families import sd3_with_words
from hasten import tree
from hasten.bridge.drawing import NotFinite
from hasten.measure.timing import Spread
from hasten.method import conflict
from hasten.recipe import Recipe
from hasten.tune import outputs, search, tune
from hasten.tune.search import Found
from hasten.tune.space import rooms, starts, suggest
from hasten.tune.subject import Task, untouched

PROMPTS = [f"prompt number {i} of a thing" for i in range(36)]


def tiny(steps: int = 6) -> Any:
    """SD3 in tiny, which takes `steps` at most, so that a test takes seconds."""
    pipe = sd3_with_words()
    plain = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda n=None, device=None, **more: plain(
        min(n or steps, steps), device=device, **more
    )
    return pipe


class Pixels:
    """Features for tests: the picture in small."""

    name = "pixels"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(images, 4).flatten(1)


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rooms that compile or need a wide network."""
    monkeypatch.setattr(tree, "METHOD_ROOMS", ("cache", "guidance"))


def wanted(trials: int = 3, quality: float = 0.0, **more: Any) -> tune.Wanted:
    first, second = tune.halves(PROMPTS, 4, 5)
    return tune.Wanted(quality, first, second, trials=trials, **more)


def found(speedup: float, quality: float) -> Found:
    seconds = Spread.of([1 / speedup])
    return Found(Recipe(solver="ddim", steps=4), Spread.of([speedup]), seconds, quality, 4, 30.0, 9.0)


def kept_trials(out: Path) -> list[Any]:
    journal = optuna.storages.journal.JournalFileBackend(str(out / "state" / "trials.journal"))
    storage = optuna.storages.JournalStorage(journal)
    return [t for s in storage.get_all_studies() for t in storage.get_all_trials(s._study_id)]


def quietly() -> Console:
    return Console(quiet=True)


def test_prompts_and_seeds_of_the_proof_are_not_those_of_the_search() -> None:
    first, second = tune.halves(PROMPTS + PROMPTS[:5], 9, 12)
    assert not set(first) & set(second)
    a, b = Task.of(first, 0), Task.of(second, 1)
    assert not {*a.seeds, *a.other_seeds} & {*b.seeds, *b.other_seeds}
    with pytest.raises(ValueError, match="12 or more"):
        tune.halves(PROMPTS[:5] * 4, 9, 12)


def test_every_suggestion_is_a_recipe_without_conflict_and_all_methods_that_save_are_offered() -> None:
    labels = list(tree.methods())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    seen: set[str] = set()
    for _ in range(150):
        recipe = suggest(study.ask(), labels, 28, guided=True)
        assert conflict(recipe.all_methods()) is None
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.steps is not None
        assert recipe.steps * recipe.solving().calls <= 28
        seen |= {m.label() for m in recipe.methods}
    assert seen == {label for label, kind in tree.methods().items() if kind.saves}


def test_the_search_begins_with_what_is_sure_and_with_no_other_method() -> None:
    """Starting points set every choice: what they leave open would be drawn at random."""
    labels = list(tree.methods())
    for start in starts(labels, 28):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
        study.enqueue_trial(start)
        trial = study.ask()
        recipe = suggest(trial, labels, 28, guided=True)
        named = {m.label() for m in recipe.methods}
        assert named - {"guidance.interval"} == {"runtime.bf16", "runtime.compile", "tokens.fold"}
        open_ones = trial.params.keys() - start.keys()
        assert not {n for n in open_ones if n in labels or n in ("cache", "tokens", "solver", "grid")}


def test_of_a_room_of_methods_that_exclude_each_other_one_is_chosen() -> None:
    found = rooms(list(tree.methods()))
    assert {"cache.deep", "cache.interval"} <= set(found["cache"])
    assert "cache.planned" not in found["cache"]  # without a fit it does nothing
    assert "runtime.bf16" in found[None]
    assert not set(found["cache"]) & set(found[None])


@pytest.mark.usefixtures("few_methods")
def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    pipe = tiny()
    first = tune.tune(pipe, "tiny", wanted(2), tmp_path, quietly(), Pixels())
    again = tune.tune(pipe, "tiny", wanted(4), tmp_path, quietly(), Pixels())
    assert len(first.trials) == 2
    assert len(again.trials) == 4
    assert all(t in again.trials for t in first.trials)
    assert first.plain[0].pictures.equal(again.plain[0].pictures)


@pytest.mark.usefixtures("few_methods")
def test_what_another_pipeline_or_other_prompts_left_in_the_folder_is_not_taken(tmp_path: Path) -> None:
    pipe = tiny()
    first = tune.tune(pipe, "tiny", wanted(1), tmp_path, quietly(), Pixels())
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.5)
    other = tune.tune(pipe, "tiny", wanted(1), tmp_path, quietly(), Pixels())
    assert len(other.trials) == 1
    assert not other.plain[0].pictures.equal(first.plain[0].pictures)
    search, verify = (tuple(p.replace("prompt", "thing") for p in half) for half in (wanted().search, wanted().verify))
    words = tune.tune(pipe, "tiny", tune.Wanted(0.0, search, verify, trials=1), tmp_path, quietly(), Pixels())
    assert len(words.trials) == 1
    assert not words.plain[0].pictures.equal(other.plain[0].pictures)
    assert sum(t.state.is_finished() for t in kept_trials(tmp_path)) == 3


@pytest.mark.usefixtures("few_methods")
def test_a_recipe_that_gives_nan_is_marked_failed_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = search.Search._quality, []

    def broken(self: Any, *args: Any) -> Any:
        seen.append(1)
        if len(seen) == 1:
            raise NotFinite("the pictures hold NaN or infinity")
        return whole(self, *args)

    monkeypatch.setattr(search.Search, "_quality", broken)
    outcome = tune.tune(tiny(), "tiny", wanted(3), tmp_path, quietly(), Pixels())
    assert len(outcome.trials) == 2
    assert [why for _, why in outcome.failed] == ["the pictures hold NaN or infinity"]
    assert [t.state.name for t in kept_trials(tmp_path) if t.state.is_finished()] == ["FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.usefixtures("few_methods")
def test_the_winner_is_written_whole_and_can_be_applied(tmp_path: Path) -> None:
    import json

    import hasten

    asked = wanted(3)
    pipe = tiny(28)  # a third of the steps is then faster on the busiest machine
    outcome = tune.tune(pipe, "tiny", asked, tmp_path, quietly(), Pixels())
    assert outcome.winner is not None, outcome.rejected
    outputs.write(outcome, asked, tmp_path, quietly())
    names = {p.name for p in tmp_path.iterdir()}
    assert {"recipe.yaml", "report.json", "report.html", "contact-sheet.png"} <= names
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["speedup"]) == {"denoising", "end_to_end"}
    assert {"median", "low", "high"} <= set(report["speedup"]["denoising"])
    assert report["quality"]["low"] <= report["quality"]["value"] <= report["quality"]["high"]
    assert report["quality"]["prompts"] == 5
    assert report["machine"]["torch"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/") >= 2
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    with hasten.accelerate(pipe, tmp_path / "recipe.yaml"):
        pipe("prompt number 3 of a thing", output_type="latent")


def test_a_recipe_slower_than_predicted_is_rejected_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    report = SimpleNamespace(denoising=Spread.of([2.0, 2.1]), quality=SimpleNamespace(value=0.99))
    monkeypatch.setattr(tune, "bench", lambda *_, **__: SimpleNamespace(report=report))
    outcome = tune.Outcome(None, None, None, [])  # type: ignore[arg-type]
    bar = SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda *_: None)
    fast = found(5.0, 0.99)
    tune._prove(bar, None, "x", fast, wanted(), outcome, Pixels())  # type: ignore[arg-type]
    assert outcome.winner is None
    assert "slower than predicted" in outcome.rejected[0][1]
    slow = found(2.0, 0.99)
    tune._prove(bar, None, "x", slow, wanted(), outcome, Pixels())  # type: ignore[arg-type]
    assert outcome.winner is not None


def test_a_recipe_below_the_floor_on_new_prompts_is_rejected_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    pipe, task = tiny(), Task.of(PROMPTS[:5], 1)
    plain = untouched(pipe, task, Pixels(), 5, lambda n: None)
    monkeypatch.setattr("hasten.tune.bench.compare", lambda *_: pytest.fail("timed"))
    outcome = tune.Outcome(None, plain, task, [])
    bar = SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda *_: None)
    poor = dataclasses.replace(found(5.0, 0.99), recipe=Recipe(solver="euler", grid="uniform", steps=1))
    tune._prove(bar, pipe, "x", poor, wanted(quality=0.999), outcome, Pixels())  # type: ignore[arg-type]
    assert outcome.winner is None
    assert "below 0.999; 0.990 in the search" in outcome.rejected[0][1]


def test_nothing_is_chosen_where_nothing_holds_the_floor() -> None:
    trials = [found(9.0, 0.5), found(0.9, 0.99)]
    assert tune.candidates(trials, 0.95) == []
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    outputs.show(tune.Outcome(None, None, None, trials), wanted(quality=0.95), console)  # type: ignore[arg-type]
    assert "nothing beat the untouched pipeline" in console.export_text()
    console.file.close()
