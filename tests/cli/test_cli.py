"""The command: its options are frozen, mistakes are one line and exit code 2, its list is what others read."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import typer

from families import sd3_with_words
from hasten import Recipe
from hasten.bridge import folders
from hasten.cli.main import app, main

OPTIONS = {
    "tune": ["budget_seconds", "device", "dry_run", "features", "model", "out", "prompts", "quality", "seed", "trials"],
    "fit": [
        "cache",
        "count",
        "device",
        "gradients",
        "model",
        "out",
        "prompts",
        "recipe",
        "record",
        "search",
        "seed",
        "solver",
        "steps",
    ],
    "generate": ["device", "model", "out", "prompts", "recipe", "seed"],
    "bench": ["count", "device", "features", "model", "out", "pairs", "prompts", "recipe", "seed"],
    "methods": ["json"],
    "train": ["autoencoder_steps", "device", "name", "out", "seed", "start", "steps"],
}


def test_options_are_frozen() -> None:
    command = typer.main.get_command(app)
    assert {n: sorted(p.name for p in c.params if p.name != "help") for n, c in command.commands.items()} == OPTIONS  # type: ignore[attr-defined]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hasten", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "nowhere", "x"], "no such folder"),
        (["generate", "emoji-flow", "x", "--recipe", "none.yaml"], "none.yaml"),
        (["generate", "emoji-flow", "x", "--device", "warp"], "device 'warp'"),
        (["tune", "emoji-flow", "--prompts", "none.txt"], "none.txt"),
        (["tune", "emoji-flow", "--prompts", "EMPTY"], "no prompts"),
        (["tune", "emoji-flow", "--prompts", "FEW"], "12 or more"),
        (["bench", "emoji-flow", "--recipe", "BAD"], "unknown solver 'warp'"),
        (["train", "nothing"], "no embedded model"),
        (["train", "emoji-unet", "--autoencoder-steps", "9"], "--autoencoder-steps"),
        (["fit", "emoji-flow", "--solver", "warp"], "unknown solver 'warp'"),
        (["fit", "emoji-flow", "--solver", "ddpm", "--count", "3"], "ddpm can't be fitted"),
        (["fit", "emoji-flow", "--prompts", "FEW"], "3 prompts or more"),
        (["generate", "emoji-flow", "x", "--out", "FILE/inside"], "--out"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_2(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").write_text("\n\n")
    (tmp_path / "FEW").write_text("one\ntwo\n")
    (tmp_path / "BAD").write_text("solver: warp\n")
    (tmp_path / "FILE").write_text("")
    words = [str(tmp_path / w) if w.split("/")[0] in ("EMPTY", "FEW", "BAD", "FILE") else w for w in words]
    assert run(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_fit_writes_a_recipe_that_says_what_it_gained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders.write(sd3_with_words(), tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt number {i} of a thing" for i in range(6)))
    (tmp_path / "base.yaml").write_text("hasten: 1\nmethods: [tokens.fold]\n")
    words = ["--steps", "3", "--search", "2", "--gradients", "1", "--prompts", str(tmp_path / "prompts.txt")]
    out = tmp_path / "grid.yaml"
    base = ["--recipe", str(tmp_path / "base.yaml")]
    assert run(monkeypatch, "fit", str(tmp_path / "tiny"), *words, *base, "--out", str(out)) == 0
    said, text = capsys.readouterr().out, out.read_text()
    assert "relative error of olss at 3 calls" in said and "relative error of olss at 3 calls" in text
    recipe = Recipe.load(out)
    assert (recipe.steps, len(recipe.grid or ())) == (3, 4)
    assert [m.label() for m in recipe.methods] == ["tokens.fold"]


def asked(tmp_path: Path, steps: int, out: Path) -> list[str]:
    """A tiny pipeline and three prompts on disk, and the words that ask for a fit of them into `out`."""
    folders.write(sd3_with_words(), tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt number {i} of a thing" for i in range(3)))
    prompts = ["--count", "3", "--prompts", str(tmp_path / "prompts.txt")]
    return ["fit", str(tmp_path / "tiny"), "--steps", str(steps), *prompts, "--out", str(out)]


def test_fit_cache_writes_a_plan_within_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cached.yaml"
    fit = [*asked(tmp_path, 6, out), "--cache", "0.3"]
    assert run(monkeypatch, *fit) == 0
    said, recipe = capsys.readouterr().out, Recipe.load(out)
    (plan,) = recipe.methods
    found = re.search(r"(\d) of 6 evaluations run in full; latents move by ([\d.]+)%", said)
    assert found is not None
    assert plan.label() == "cache.planned"
    assert len(plan.compute) == int(found[1]) < 6  # type: ignore[attr-defined]
    assert float(found[2]) <= 30
    assert recipe.steps == 6
    assert run(monkeypatch, *fit, "--recipe", str(out)) == 2
    assert "the recipe has a cache already" in capsys.readouterr().err


def test_fit_record_writes_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mag.yaml"
    fit = [*asked(tmp_path, 5, out), "--record"]
    assert run(monkeypatch, *fit, "cache.magnitude") == 0
    recipe = Recipe.load(out)
    (method,) = recipe.methods
    assert (method.label(), len(method.ratios), recipe.steps) == ("cache.magnitude", 4, 5)  # type: ignore[attr-defined]
    assert run(monkeypatch, *fit, "cache.interval") == 2
    said = capsys.readouterr().err
    assert "cache.interval has nothing to record; these have: cache.block, cache.magnitude, cache.tea" in said


def test_methods_json_is_what_others_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "methods", "--json") == 0
    things = json.loads(capsys.readouterr().out)
    kinds = {"solver", "grid", "guidance", "method", "objective", "metric"}
    assert {t["kind"] for t in things} == kinds
    for t in things:
        assert {"name", "kind", "systems", "settings", "source"} <= set(t)
        assert len(t["source"]) > 20
        for s in t["settings"]:
            assert set(s) == {"name", "type", "default", "range"}
        if t["kind"] == "solver":
            assert {"order", "calls", "stochastic"} <= set(t)
        if t["kind"] == "method":
            assert {"stage", "writes"} <= set(t)
    names = {t["name"] for t in things}
    assert {
        "ddim",
        "euler",
        "heun",
        "dpmpp_2m",
        "unipc",
        "ipndm",
        "log_snr",
        "runtime.bf16",
        "runtime.compile",
    } <= names
    assert {"cache.interval", "cache.first_block", "guidance.interval", "quant.w8a8"} <= names


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "tune", "--help") == 0
    said = capsys.readouterr().out
    assert "Example" in said
    assert "--quality" in said
