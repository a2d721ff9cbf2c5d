"""The search never tries what conflicts, survives faults and interruption, and reports what it did not search on."""

from __future__ import annotations

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
from hasten.method import conflict
from hasten.recipe import Recipe
from hasten.tune import outputs, search, tune
from hasten.tune.search import Found
from hasten.tune.space import suggest
from hasten.tune.subject import Task

PROMPTS = [f"prompt number {i} of a thing" for i in range(36)]


def tiny() -> Any:
    """SD3 in tiny, which takes 6 steps where nothing else is asked, so that a test takes seconds."""
    pipe = sd3_with_words()
    plain = pipe.scheduler.set_timesteps
    pipe.scheduler.set_timesteps = lambda n=None, device=None, **more: plain(min(n or 6, 6), device=device, **more)
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


def quietly() -> Console:
    return Console(quiet=True)


def test_prompts_and_seeds_of_the_proof_are_not_those_of_the_search() -> None:
    first, second = tune.halves(PROMPTS + PROMPTS[:5], 9, 12)
    assert not set(first) & set(second)
    a, b = Task.of(first, 0), Task.of(second, 1)
    assert not {*a.seeds, *a.other_seeds} & {*b.seeds, *b.other_seeds}
    with pytest.raises(ValueError, match="12 or more"):
        tune.halves(PROMPTS[:5] * 4, 9, 12)


def test_every_suggestion_is_a_recipe_without_conflict_and_all_methods_are_offered() -> None:
    labels = list(tree.methods())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    seen: set[str] = set()
    for _ in range(150):
        recipe = suggest(study.ask(), labels, 28, guided=True)
        assert conflict(recipe.all_methods()) is None
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert recipe.steps is not None
        assert recipe.steps * tree.function("solvers", str(recipe.solver)).calls <= 28
        seen |= {m.label() for m in recipe.methods}
    assert seen == set(labels)


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
    study = optuna.load_study(
        study_name="hasten",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "state" / "trials.journal"))
        ),
    )
    assert [t.state.name for t in study.trials if t.state.is_finished()] == ["FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.usefixtures("few_methods")
def test_the_winner_is_written_whole_and_can_be_applied(tmp_path: Path) -> None:
    import json

    import hasten

    asked = wanted(3)
    pipe = tiny()
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

    from hasten.measure.timing import Spread

    report = SimpleNamespace(denoising=Spread.of([2.0, 2.1]), quality=SimpleNamespace(value=0.99))
    monkeypatch.setattr(tune, "bench", lambda *_, **__: SimpleNamespace(report=report))
    outcome = tune.Outcome(None, None, None, [])  # type: ignore[arg-type]
    bar = SimpleNamespace(add_task=lambda *_, **__: 0, advance=lambda *_: None)
    fast = Found(Recipe(solver="ddim", steps=4), speedup=5.0, seconds=0.1, quality=0.99)
    tune._prove(bar, None, "x", fast, wanted(), outcome, Pixels())  # type: ignore[arg-type]
    assert outcome.winner is None
    assert "slower than predicted" in outcome.rejected[0][1]
    slow = Found(Recipe(solver="ddim", steps=4), speedup=2.0, seconds=0.1, quality=0.99)
    tune._prove(bar, None, "x", slow, wanted(), outcome, Pixels())  # type: ignore[arg-type]
    assert outcome.winner is not None


def test_nothing_is_chosen_where_nothing_holds_the_floor() -> None:
    trials = [Found(Recipe(solver="ddim"), 9.0, 0.1, 0.5), Found(Recipe(solver="ddim"), 0.9, 1.0, 0.99)]
    assert tune.candidates(trials, 0.95) == []
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    outputs.show(tune.Outcome(None, None, None, trials), wanted(quality=0.95), console)  # type: ignore[arg-type]
    assert "nothing beat the untouched pipeline" in console.export_text()
    console.file.close()
