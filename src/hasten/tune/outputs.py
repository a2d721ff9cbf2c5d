"""What `tune` prints and leaves behind: table, recipe, report, page and contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hasten import tree
from hasten.atomic import write_text_atomically
from hasten.bridge.pipelines import networks
from hasten.measure.html import html
from hasten.measure.pictures import Point, contact_sheet, pareto, pictures
from hasten.recipe import Recipe
from hasten.tune.space import refusals
from hasten.tune.tune import Outcome, Wanted, headline, table

SHOWN = 12
"""Pictures on the contact sheet."""


def show(outcome: Outcome, wanted: Wanted, console: Console) -> None:
    """Prints the search's table, the proof's, and what was chosen or why nothing was."""
    console.print(table(outcome))
    for what, why in outcome.rejected:
        console.print(f"[yellow]rejected[/] {what}: {why}", highlight=False)
    for what, why in outcome.failed[:3]:
        console.print(f"[yellow]broke[/] {what}: {why}", highlight=False)
    if len(outcome.failed) > 3:
        console.print(f"[yellow]broke[/] {len(outcome.failed) - 3} more")
    for label, why in outcome.refused.items():
        console.print(f"[dim]not tried: {label}: {why}[/]", highlight=False)
    if outcome.winner is None:
        console.print(
            f"nothing beat the untouched pipeline at quality {wanted.quality}: keep it as it is, or lower --quality"
        )
        return
    report = outcome.winner.report
    console.print("[bold]chosen[/], measured on prompts and seeds that were not searched on:")
    console.print(report.table())
    console.print(f"{report.denoising} faster denoising, {report.end_to_end} end to end, quality {report.quality}")


def write(outcome: Outcome, wanted: Wanted, out: Path, console: Console) -> None:
    """recipe.yaml, report.json, report.html and contact-sheet.png in `out`; each whole or not at all."""
    if outcome.winner is None:
        return
    report = outcome.winner.report
    recipe = Recipe.from_dict(report.recipe)
    comment = (
        f"found by `hasten tune {report.pipeline} --quality {wanted.quality}`\n"
        f"denoising {report.denoising}, end to end {report.end_to_end}, quality {report.quality}"
    )
    recipe.save(out / "recipe.yaml", comment)
    report.write(out / "report.json")
    sheet = contact_sheet(
        [
            ("untouched", pictures(outcome.plain[0].pictures[:SHOWN])),
            ("tuned", pictures(outcome.winner.recipe_pictures[:SHOWN])),
        ],
        list(outcome.task.prompts[:SHOWN]), out / "contact-sheet.png",
    )  # fmt: skip
    plot = pareto(*_points(outcome), out / "pareto.png")
    write_text_atomically(
        out / "report.html", html(report, {"Same prompts and seeds": sheet, "Every recipe tried": plot})
    )
    for name in ("recipe.yaml", "report.json", "report.html", "contact-sheet.png"):
        console.print(f"wrote {out / name}", highlight=False)


def _points(outcome: Outcome) -> tuple[list[Point], str]:
    assert outcome.winner is not None
    report = outcome.winner.report
    plain = Point("untouched", report.untouched.denoising_seconds.median, 1.0, untouched=True)
    chosen = Point("chosen", report.tuned.denoising_seconds.median, report.quality.value)
    return [
        plain,
        *(Point(headline(t.recipe), t.seconds.median, t.quality) for t in outcome.trials),
        chosen,
    ], chosen.name


def plan(pipe: Any, model: str, search: Sequence[str], proof: Sequence[str], trials: int, budget: float | None) -> str:
    """What a run would do, in words; tries nothing but whether each method can be applied."""
    net = next(iter(networks(pipe).values()))
    size = sum(p.numel() for p in net.parameters()) / 1e6
    lines = [
        f"{model}: {type(pipe).__name__}, {type(net).__name__} of {size:.1f} M parameters",
        f"search on {len(search)} prompts, at most {trials} recipes" + (f", {budget:g} s in all" if budget else ""),
        f"prove on {len(proof)} other prompts",
        f"solvers: {', '.join(tree.functions('solvers'))}",
        f"grids: {', '.join(tree.functions('grids'))}",
    ]
    refused = refusals(net)
    tried = (f"{m}: " + (f"not here: {refused[m]}" if m in refused else "would be tried") for m in tree.methods())
    return "\n".join([*lines, *tried])
