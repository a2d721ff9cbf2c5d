"""What the commands do: load, call the library, write, print."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hasten import reference, tree
from hasten.api import accelerate
from hasten.bridge import folders
from hasten.bridge.drawing import draw, quiet
from hasten.measure.pictures import kept, pictures
from hasten.recipe import Recipe
from hasten.tune import bench as benching
from hasten.tune import outputs
from hasten.tune import tune as tuning
from hasten.tune.features import features as feature_reader
from hasten.tune.prompts import default_prompts, read_prompts
from hasten.tune.subject import Task, untouched


class UserError(ValueError):
    """A mistake in what was asked; one line."""


def load(model: str, device: str | None) -> Any:
    """The pipeline of an embedded name, folder or hub id, on `device`."""
    place = _device(device)
    pipe = reference.pipeline(model) if model in reference.NAMES else folders.read(model)
    return quiet(pipe.to(place) if place is not None else pipe)


def tune(
    model: str, quality: float, out: Path, trials: int, budget_seconds: float | None, prompts: Path | None, seed: int,
    features: str, device: str | None, dry_run: bool,
) -> None:  # fmt: skip
    """Loads, tunes, shows, writes; with `dry_run` says what would be tried."""
    console = Console()
    given = read_prompts(prompts) if prompts else default_prompts(model)
    try:
        search, proof = tuning.halves(given, 12, 24)
    except ValueError as error:
        raise UserError(str(error)) from None
    pipe = load(model, device)
    if dry_run:
        console.print(outputs.plan(pipe, model, search, proof, trials, budget_seconds))
        return
    _writable(out)
    wanted = tuning.Wanted(quality, search, proof, trials, budget_seconds, seed)
    outcome = tuning.tune(pipe, model, wanted, out, console, feature_reader(features, device))
    outputs.show(outcome, wanted, console)
    outputs.write(outcome, wanted, out, console)


def fit(
    model: str, steps: int, solver: str | None, out: Path, prompts: Path | None, count: int, seed: int, search: int,
    gradients: int, recipe: Path | None, device: str | None,
) -> None:  # fmt: skip
    """The fitted recipe in `out`, and on the screen what it gains over fixed grids."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from hasten.fit.fit import Effort, calls, fittable, table
    from hasten.fit.pipeline import fit_pipeline

    console = Console()
    try:
        chosen = tree.function("solvers", solver) if solver else None
    except ValueError as error:
        raise UserError(str(error)) from None
    fittable(chosen)
    given = spread(read_prompts(prompts) if prompts else default_prompts(model), count)
    effort = Effort(search=search, rounds=gradients)
    _writable(out.parent)
    pipe = load(model, device)
    bar = Progress(TextColumn("network calls"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f}"),
                   TimeRemainingColumn(), console=console)  # fmt: skip
    base = Recipe.load(recipe) if recipe else Recipe.from_dict({})
    kept = {"methods": base.methods, "guidance": base.guidance}
    with bar, accelerate(pipe, Recipe.from_dict({}).model_copy(update=kept)):
        line = bar.add_task("", total=calls(chosen, steps, effort))
        found = fit_pipeline(pipe, given, steps, chosen, seed=seed, effort=effort, tick=lambda n: bar.advance(line, n))
    text = table(found)
    console.print(text, highlight=False)
    found.recipe.model_copy(update=kept).save(out, f"fitted by hasten to {model}, {steps} calls\n{text}")
    console.print(f"recipe: {out}", highlight=False)


def fit_cache(
    model: str, budget: float, steps: int | None, out: Path, prompts: Path | None, count: int, seed: int,
    recipe: Path | None, device: str | None,
) -> None:  # fmt: skip
    """The recipe with a plan of when to recompute in `out`, and on the screen what it spares and costs."""
    from rich.progress import Progress

    from hasten.fit.reuse import PARTS, SEARCH, plan

    console = Console()
    base, given, pipe = _given(model, steps, out, prompts, count, recipe, device)
    with Progress(console=console) as bar:
        line = bar.add_task(f"runs of {len(given)} pictures", total=PARTS + 6 + SEARCH)
        found = plan(pipe, given, budget, base, seed=seed, tick=lambda n: bar.advance(line, n))
    text = (
        f"{found.computed} of {found.steps} evaluations run in full; latents move by {found.measured:.2%} on these "
        f"prompts (allowed {budget:.2%})"
    )
    console.print(text, highlight=False)
    found.recipe.save(out, f"fitted by hasten to {model}\n{text}")
    console.print(f"recipe: {out}", highlight=False)


def fit_record(
    model: str, label: str, steps: int | None, out: Path, prompts: Path | None, count: int, seed: int,
    recipe: Path | None, device: str | None,
) -> None:  # fmt: skip
    """The recipe with a method whose settings were measured, in `out`."""
    from hasten.fit.record import record

    console = Console()
    base, given, pipe = _given(model, steps, out, prompts, count, recipe, device)
    with console.status(f"drawing {len(given)} pictures"):
        try:
            found = record(pipe, given, label, base, seed=seed)
        except ValueError as error:
            raise UserError(str(error)) from None
    found.save(out, f"{label} as recorded by hasten on {model}")
    console.print(f"recipe: {out}", highlight=False)


def _given(
    model: str, steps: int | None, out: Path, prompts: Path | None, count: int, recipe: Path | None, device: str | None
) -> tuple[Recipe, list[str], Any]:  # fmt: skip
    """What is measured: the recipe to go on, the prompts, and the pipeline, after a look whether `out` can be
    written."""
    base = Recipe.load(recipe) if recipe else Recipe.from_dict({})
    base = base.model_copy(update={"steps": steps}) if steps else base
    given = spread(read_prompts(prompts) if prompts else default_prompts(model), count)
    _writable(out.parent)
    return base, given, load(model, device)


def spread(prompts: list[str], count: int) -> list[str]:
    """`count` of the prompts, evenly over the list. Raises UserError where there are fewer than 3."""
    if len(prompts) < 3:
        raise UserError(f"a fit needs 3 prompts or more, given {len(prompts)}")
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def generate(model: str, prompts: list[str], recipe: Path | None, seed: int, out: Path, device: str | None) -> None:
    """One PNG a prompt, whole or not at all, and what the recipe did."""
    from rich.progress import track

    console = Console()
    wanted = Recipe.load(recipe) if recipe else None
    _writable(out)
    pipe = load(model, device)
    handle = accelerate(pipe, wanted) if wanted else None
    began = time.perf_counter()
    seeds = range(seed, seed + len(prompts))
    drawing = draw(pipe, prompts, list(seeds))
    for i, part in enumerate(track(drawing, "drawing", total=len(prompts), console=console)):
        name = "".join(c if c.isalnum() else "-" for c in prompts[i])[:60].strip("-") or "picture"
        file = out / f"{seeds[i]:04d}-{name}.png"
        kept(pictures(part)[0], file)
        console.print(f"{file}", highlight=False)
    console.print(f"{len(prompts)} pictures in {time.perf_counter() - began:.2f} s")
    if handle is not None:
        console.print(str(handle), highlight=False)


def bench(
    model: str,
    recipe: Path,
    pairs: int,
    prompts: Path | None,
    count: int,
    seed: int,
    features: str,
    out: Path | None,
    device: str | None,
) -> None:
    """The report of a recipe against the untouched pipeline, printed and, with `out`, kept."""
    from rich.progress import Progress

    console = Console()
    wanted = Recipe.load(recipe)
    given = (read_prompts(prompts) if prompts else default_prompts(model))[:count]
    pipe, read, task = load(model, device), feature_reader(features, device), Task.of(given, seed)
    with Progress(console=console) as bar:
        line = bar.add_task("pictures", total=3 * len(given) + 2 * (pairs + 2))
        plain = untouched(pipe, task, read, 8, lambda n: bar.advance(line, n))
        done = benching.bench(pipe, wanted, task, plain, read, model, pairs=pairs, tick=lambda n: bar.advance(line, n))
    console.print(done.report.table())
    if out is not None:
        done.report.write(out)
        console.print(f"report: {out}")


def train(
    name: str, out: Path, steps: int, autoencoder_steps: int | None, seed: int, device: str | None, start: Path | None
) -> None:
    """Trains an embedded model into `out`."""
    if name not in reference.NAMES:
        raise UserError(f"no embedded model {name!r}; there is {', '.join(reference.NAMES)}")
    if name == "emoji-unet" and autoencoder_steps is not None:
        raise UserError("emoji-unet has the autoencoder of emoji-flow as it is: leave --autoencoder-steps out")
    _writable(out)
    from hasten.reference import training, training_unet

    place = str(_device(device)) if device is not None else None
    if name == "emoji-unet":
        training_unet.train_pipeline(out, steps, seed, place, start)
    else:
        training.train_pipeline(out, steps, autoencoder_steps or 4_000, seed, place, start)


def _device(device: str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = "cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise UserError(f"device {device!r} is not to be had here; there is {there}") from None
    return place


def _writable(out: Path) -> None:
    """Finds out before the work, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; choose a folder that can be written with --out") from None
