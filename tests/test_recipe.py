"""Recipes are strict: every mistake is one line that says what was given and what is expected, and nothing is lost."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hasten.method import Stage
from hasten.recipe import Guidance, Recipe, RecipeError

EXAMPLE = """\
hasten: 1
solver: dpmpp_2m
grid: log_snr              # or a list of times
steps: 8
guidance: {scale: 3.0, interval: [0.2, 0.9]}
methods:
  - cache.interval: {every: 2}
  - quant.w8a8: {}
"""


def test_the_example_loads(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(EXAMPLE)
    recipe = Recipe.load(file)
    assert (recipe.solver, recipe.grid, recipe.steps) == ("dpmpp_2m", "log_snr", 8)
    assert recipe.guidance == Guidance(scale=3.0, interval=(0.2, 0.9))
    assert [m.label() for m in recipe.methods] == ["cache.interval", "quant.w8a8"]
    assert recipe.methods[0].model_dump() == {"every": 2}


RECIPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "solver alone": {"solver": "ddim"},
    "steps alone": {"steps": 1},
    "times": {"solver": "euler", "grid": [1.0, 0.6, 0.25, 0.0]},
    "times and steps": {"solver": "euler", "grid": [1, 0.5, 0], "steps": 2},
    "grid with settings": {"solver": "unipc", "grid": {"shifted": {"shift": 2.5}}, "steps": 6},
    "guidance": {"guidance": {"interval": [0.0, 0.5]}},
    "methods by name": {"methods": ["runtime.bf16", {"cache.first_block": {"threshold": 0.2}}]},
    "noise": {"solver": "sde_dpmpp_2m", "noise": "path"},
    "settings left empty": {"methods": [{"cache.interval": None}]},
}


@pytest.mark.parametrize("data", RECIPES.values(), ids=RECIPES)
def test_round_trips(data: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.from_dict(data)
    plain = recipe.to_dict()
    assert Recipe.from_dict(plain) == recipe
    assert Recipe.from_dict(plain).to_dict() == plain
    recipe.save(tmp_path / "r.yaml", comment="found on a Tuesday\nby trying: 100 % of it")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert [f.name for f in tmp_path.iterdir()] == ["r.yaml"]


def test_absent_parts_are_left_out_and_methods_keep_every_setting() -> None:
    assert Recipe().to_dict() == {"hasten": 1}
    written = Recipe.from_dict({"methods": ["cache.interval"]}).to_dict()
    assert written == {"hasten": 1, "methods": [{"cache.interval": {"every": 2}}]}  # a default may change, a recipe not


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe(steps=3).steps = 4  # type: ignore[misc]


def test_methods_are_put_in_order_of_their_stage() -> None:
    methods = ["cache.interval", "runtime.compile", "runtime.bf16"]
    recipe = Recipe.from_dict({"methods": methods, "guidance": {"interval": [0.1, 0.9]}})
    labels = [m.label() for m in recipe.all_methods()]
    assert labels == ["runtime.bf16", "runtime.compile", "cache.interval", "guidance.interval"]
    assert [m.stage for m in recipe.all_methods()] == [Stage.ADAPT, Stage.COMPILE, Stage.CACHE, Stage.GUIDANCE]


MISTAKES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "noise without a solver": ({"noise": "path"}, ("noise is of solvers that add some", "sde_dpmpp_2m")),
    "noise of a solver that adds none": ({"solver": "euler", "noise": "path"}, ("noise is of solvers that add some",)),
    "noise unknown": ({"solver": "ddpm", "noise": "pink"}, ("noise", "fresh", "path")),
    "unknown key": ({"solvr": "ddim"}, ("unknown key", "solvr", "solver, grid, steps, noise, guidance, methods")),
    "unknown key within": ({"guidance": {"sclae": 3}}, ("unknown key", "guidance.sclae", "scale, interval")),
    "unknown setting": ({"methods": [{"cache.interval": {"evry": 2}}]}, ("cache.interval", "evry", "every")),
    "unknown solver": ({"solver": "dpm"}, ("unknown solver", "dpm", "did you mean ddpm", "hasten methods")),
    "a file that is no solver": ({"solver": "drive"}, ("unknown solver", "drive", "`hasten methods` lists all")),
    "a path for a solver": ({"solver": "../ddim"}, ("unknown solver", "../ddim")),
    "unknown grid": ({"solver": "ddim", "grid": "cosine"}, ("unknown grid", "cosine")),
    "unknown method": ({"methods": ["cache.magic"]}, ("unknown method", "cache.magic", "`hasten methods` lists all")),
    "a room for a method": ({"methods": ["cache"]}, ("unknown method", "'cache'")),
    "a file that is no method": ({"methods": ["cache.residual"]}, ("unknown method", "cache.residual")),
    "setting too large": ({"methods": [{"cache.interval": {"every": 11}}]}, ("cache.interval", "every", "11", "10")),
    "setting too small": ({"methods": [{"cache.first_block": {"threshold": -0.1}}]}, ("threshold", "-0.1", "0")),
    "setting of a wrong type": ({"methods": [{"cache.interval": {"every": "two"}}]}, ("every", "'two'", "integer")),
    "grid setting out of range": ({"solver": "ddim", "grid": {"shifted": {"shift": 0}}}, ("shifted", "shift", "0")),
    "unknown grid setting": ({"solver": "ddim", "grid": {"shifted": {"shft": 2}}}, ("shifted", "shft", "shift")),
    "a setting of a grid that has none": ({"solver": "ddim", "grid": {"uniform": {"a": 1}}},
                                          ("uniform", "unknown key", "a", "none")),
    "two grids": ({"solver": "ddim", "grid": {"uniform": {}, "karras": {}}}, ("one name", "uniform", "karras")),
    "a grid without a solver": ({"grid": "uniform"}, ("grid needs a solver", "solver: ddim")),
    "zero steps": ({"steps": 0}, ("steps", "0", "greater than or equal to 1")),
    "negative steps": ({"steps": -4}, ("steps", "-4", "greater than or equal to 1")),
    "half a step": ({"steps": 2.5}, ("steps", "2.5", "integer")),
    "a million steps": ({"steps": 10**6}, ("steps", "1000000", "10000")),
    "a rising grid": ({"solver": "ddim", "grid": [0.0, 0.5, 1.0]}, ("fall from 1", "[0.0, 0.5, 1.0]")),
    "a grid that stands still": ({"solver": "ddim", "grid": [1.0, 0.5, 0.5, 0.0]}, ("fall", "0.5, 0.5")),
    "one time": ({"solver": "ddim", "grid": [1.0]}, ("fall from 1", "[1.0]")),
    "times above 1": ({"solver": "ddim", "grid": [1000, 500, 0]}, ("[0, 1]", "1000.0")),
    "times that are not numbers": ({"solver": "ddim", "grid": ["a", "b"]}, ("a grid is", "times", "'a'")),
    "nan among times": ({"solver": "ddim", "grid": [1.0, float("nan"), 0.0]}, ("nan",)),
    "times against steps": ({"solver": "ddim", "grid": [1, 0.5, 0], "steps": 5}, ("2 steps", "5")),
    "negative scale": ({"guidance": {"scale": -1}}, ("guidance.scale", "-1", "greater than or equal to 0")),
    "infinite scale": ({"guidance": {"scale": float("inf")}}, ("guidance.scale", "inf")),
    "an interval that falls": ({"guidance": {"interval": [0.9, 0.2]}}, ("interval", "low <= high")),
    "an interval of three": ({"guidance": {"interval": [0.1, 0.2, 0.3]}}, ("guidance.interval",)),
    "two caches": ({"methods": ["cache.interval", "cache.first_block"]},
                   ("cache.interval", "cache.first_block", "both write", "schedule", "keep one")),
    "one method twice": ({"methods": ["runtime.bf16", "runtime.bf16"]}, ("runtime.bf16", "both write")),
    "two guidance intervals": ({"guidance": {"interval": [0.2, 0.9]}, "methods": ["guidance.interval"]},
                               ("guidance.interval", "both write")),
    "methods as a mapping": ({"methods": {"cache.interval": {}}}, ("methods is a list",)),
    "two methods in one item": ({"methods": [{"cache.interval": {}, "runtime.bf16": {}}]}, ("one name",)),
    "a number for a method": ({"methods": [3]}, ("one name with its settings", "3")),
    "settings that are a list": ({"methods": [{"cache.interval": [2]}]}, ("cache.interval", "settings", "[2]")),
    "an older hasten's question": ({"hasten": 2}, ("version 2", "version 1", "update")),
    "a version in words": ({"hasten": "one"}, ("version", "'one'")),
    "a list": ([1, 2], ("mapping", "[1, 2]")),
    "a word": ("ddim", ("mapping", "'ddim'")),
    "nothing at all": (None, ("mapping", "None")),
    "yes for a number": ({"steps": True}, ("steps", "True", "integer")),
    "a number in quotes": ({"steps": "8"}, ("steps", "'8'", "integer")),
    "yes for a scale": ({"guidance": {"scale": True}}, ("guidance.scale", "True", "number")),
    "yes for a time": ({"solver": "ddim", "grid": [True, False]}, ("grid", "True")),
    "yes for a setting": ({"methods": [{"cache.interval": {"every": True}}]}, ("every", "True", "integer")),
    "yes for a version": ({"hasten": True}, ("version", "True")),
    "a number for settings": ({"methods": [{"cache.interval": 0}]}, ("cache.interval", "settings", "0")),
    "an empty list for settings": ({"methods": [{"cache.interval": []}]}, ("cache.interval", "settings", "[]")),
    "a number for a grid": ({"solver": "ddim", "grid": 3}, ("a grid is", "times", "3")),
    "a number for a grid's settings": ({"solver": "ddim", "grid": {"shifted": 3}}, ("shifted", "settings", "3")),
    "keys that are not words": ({3: 4}, ("3",)),
}  # fmt: skip


JARGON = ("pydantic", "validation error", "Value error", "instance of", "dict[", "tuple[", "after validation", "Input")


@pytest.mark.parametrize(("data", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_one_line(data: Any, says: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data)
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 400
    assert not any(word in told for word in JARGON), told
    for word in says:
        assert word in told, told


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(RecipeError, match=r"steps.*0.*; unknown key 'colour'"):
        Recipe.from_dict({"steps": 0, "colour": "red"})


BROKEN: dict[str, tuple[bytes, str]] = {
    "not YAML": (b"solver: [ddim\nsteps: 8", "not YAML"),
    "a key twice": (b"steps: 4\nsteps: 8\n", "steps"),
    "nested beyond reason": (b"[" * 3000, "not YAML"),
    "two documents": (b"hasten: 1\n---\nhasten: 1\n", "not YAML"),
    "tags that build objects": (b"!!python/object/apply:os.getcwd []\n", "not YAML"),
    "binary": (bytes(range(128, 256)) * 4, "not a text file"),
    "a control character": (b"solver: ddim\x00", "not YAML"),
    "empty": (b"", "mapping"),
    "a mistake within": (b"steps: 0\n", "steps"),
}


@pytest.mark.parametrize(("content", "says"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_recipe_is_named(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    told = str(caught.value)
    assert told.startswith(f"{file}: ")
    assert says in told
    assert "\n" not in told


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=r"[Dd]irectory"):
        Recipe.load(tmp_path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "r.yaml"
    Recipe(steps=3).save(file)
    before = file.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        Recipe(steps=4).save(file)
    monkeypatch.undo()
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["r.yaml"]  # and no half-written one beside it


def test_a_saved_recipe_can_be_read_by_others(tmp_path: Path) -> None:
    """As any file the user makes, not private to him as temporary files are."""
    plain, file = tmp_path / "plain", tmp_path / "r.yaml"
    plain.touch()
    Recipe(steps=3).save(file)
    assert file.stat().st_mode == plain.stat().st_mode
