"""The command `hasten`: typed, thin, and without torch until a command runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler, which counts memory, writes over the progress

app = typer.Typer(
    name="hasten", no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Makes diffusion and flow models fast, proves it, and undoes itself exactly.\n\n"
    "MODEL is an embedded name (emoji-flow), the folder of a diffusers pipeline, or a hub id (owner/name).",
)  # fmt: skip

INTERRUPTED = 130
"""Exit code after SIGINT."""

Model = Annotated[str, typer.Argument(help="embedded name, diffusers folder or hub id")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="a recipe, YAML; see `hasten methods` for its words")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; where the pipeline runs")]
Features = Annotated[
    str,
    typer.Option(
        help="what quality is measured with: efficientnet-lite0; a CLIP or DINOv2 folder or hub id; Inception .pt"
    ),
]
Prompts = Annotated[Path | None, typer.Option(help="a text file, one prompt a line, 12 or more")]


@app.command(rich_help_panel="The main job")
def tune(
    model: Model,
    quality: Annotated[float, typer.Option(min=0, max=1, help="floor: 1 is as a second untouched run")] = 0.95,
    out: Annotated[Path, typer.Option(help="folder for recipe, report, pictures and the search's state")] = Path("out"),
    trials: Annotated[int, typer.Option(min=1, help="recipes to try at most")] = 40,
    budget_seconds: Annotated[float | None, typer.Option(min=1, help="time for search and proof together, s")] = None,
    prompts: Prompts = None,
    seed: Annotated[int, typer.Option(min=0, help="of the search and of the pictures")] = 0,
    features: Features = "efficientnet-lite0",
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be tried, and stop")] = False,
) -> None:
    """Find the fastest recipe for MODEL that keeps QUALITY, prove it on prompts it was not searched on, write it to
    OUT.

    Run again with the same OUT, an interrupted search goes on. Example: hasten tune emoji-flow --quality 0.95 --out
    out/
    """
    from hasten.cli import jobs

    jobs.tune(model, quality, out, trials, budget_seconds, prompts, seed, features, device, dry_run)


@app.command(rich_help_panel="The main job")
def fit(
    model: Model,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=100, help="network calls a picture, guidance counted once; absent: 6, with --cache all"
        ),
    ] = None,
    cache: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="fit when to recompute: how far pictures may move, relative, such as 0.05"),
    ] = None,
    record: Annotated[
        str | None, typer.Option(help="measure the settings of this method instead: cache.tea, cache.magnitude ...")
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="fit the times of this one (see `hasten methods`); absent: fit its weights too")
    ] = None,
    out: Annotated[Path, typer.Option(help="where the recipe goes, YAML")] = Path("grid.yaml"),
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=3, help="prompts to fit on; a third of them judges")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="of the noise and of the search")] = 0,
    search: Annotated[int, typer.Option(min=0, help="grids to try after the fixed ones")] = 40,
    gradients: Annotated[int, typer.Option(min=0, help="rounds of learning through the network; needs memory")] = 0,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="its methods and guidance are put on first")] = None,
    device: Device = None,
) -> None:
    """Fit the times of STEPS network calls to MODEL's own fine trajectories, and write them to OUT as a recipe.

    Below ten calls the grid matters more than the solver. Example: hasten fit emoji-flow --steps 6 --out grid.yaml,
    then hasten generate emoji-flow "a red apple" --recipe grid.yaml

    With --cache, fit which evaluations run in full instead, the others reusing what these kept: hasten fit emoji-flow
    --cache 0.05 --out cached.yaml

    With --record, measure what a method must know of a model: hasten fit emoji-flow --record cache.tea --out tea.yaml
    """
    from hasten.cli import jobs

    if record is not None:
        jobs.fit_record(model, record, steps, out, prompts, count, seed, recipe, device)
        return
    if cache is not None:
        jobs.fit_cache(model, cache, steps, out, prompts, count, seed, recipe, device)
        return
    steps = steps or 6
    jobs.fit(model, steps, solver, out, prompts, count, seed, search, gradients, recipe, device)


@app.command(rich_help_panel="With a recipe")
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="one picture each")],
    recipe: RecipeFile = None,
    seed: Annotated[int, typer.Option(min=0, help="of the first picture; the next has the next")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the pictures, PNG")] = Path("pictures"),
    device: Device = None,
) -> None:
    """Draw PROMPTS with MODEL, with or without a recipe. Example: hasten generate emoji-flow "a red apple" --out
    pictures/"""
    from hasten.cli import jobs

    jobs.generate(model, prompts, recipe, seed, out, device)


@app.command(rich_help_panel="With a recipe")
def bench(
    model: Model,
    recipe: Annotated[Path, typer.Option("--recipe", help="a recipe, YAML")],
    pairs: Annotated[int, typer.Option(min=1, help="interleaved pairs of untouched and recipe")] = 10,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=12, help="prompts to measure quality on")] = 36,
    seed: Annotated[int, typer.Option(min=0, help="of the pictures")] = 0,
    features: Features = "efficientnet-lite0",
    out: Annotated[Path | None, typer.Option(help="where the report goes, JSON")] = None,
    device: Device = None,
) -> None:
    """Measure a recipe against the untouched MODEL: speed in interleaved pairs beside quality, from one run."""
    from hasten.cli import jobs

    jobs.bench(model, recipe, pairs, prompts, count, seed, features, out, device)


@app.command(rich_help_panel="What there is")
def methods(
    json: Annotated[bool, typer.Option("--json", help="as a list of objects")] = False,
) -> None:
    """List every solver, grid, guidance, method, objective and metric: settings with ranges, what it writes, its
    source."""
    from hasten.cli import listing

    listing.show(json)


@app.command(rich_help_panel="The embedded models")
def train(
    name: Annotated[str, typer.Argument(help="emoji-flow or emoji-unet")],
    out: Annotated[
        Path | None, typer.Option(help="folder for checkpoints, sample grids and the pipeline; absent: NAME")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="of the transformer, 64 pictures each, or of the U-Net, 32 each")
    ] = 6_000,
    autoencoder_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="of emoji-flow's autoencoder, which emoji-unet shares; 32 pictures each; absent: 4000"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
    start: Annotated[Path | None, typer.Option(help="pipeline folder to go on from, with its autoencoder")] = None,
) -> None:
    """Train an embedded model from its data. Run again with the same OUT, it goes on from its last checkpoint,
    exactly."""
    from hasten.cli import jobs

    jobs.train(name, out or Path(name), steps, autoencoder_steps, seed, device, start)


def main() -> None:
    """Runs the command; a user's mistake is one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        if not _expected(error):
            raise
        sys.stderr.write(f"hasten: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's, without a word
            sys.stderr.write("hasten: interrupted; run the same command again to go on\n")
        raise


def _expected(error: BaseException) -> bool:
    """One of hasten's own errors, or a fault of the file system."""
    return isinstance(error, OSError) or type(error).__module__.startswith("hasten.")
