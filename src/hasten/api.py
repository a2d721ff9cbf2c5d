"""The front door: put a recipe on a pipeline, take it off, save both, load both."""

from __future__ import annotations

import os
from pathlib import Path as File
from typing import Any

from torch import nn

from hasten.bridge import folders, pipelines
from hasten.bridge.clock import Clock
from hasten.patch import Patch
from hasten.recipe import Recipe, RecipeError

RECIPE = "recipe.yaml"


class Handle:
    """A recipe at work on one pipeline or network: what was patched where, how often it hit, and the way back."""

    def __init__(self, recipe: Recipe, patches: list[tuple[str, Patch]], clock: Clock | None) -> None:
        self.recipe, self.patches, self.clock = recipe, patches, clock

    def remove(self) -> None:
        """Everything bit for bit as before. A second call does nothing.

        Raises:
            RuntimeError: a later handle still holds something of this one's; nothing was changed. Remove that one
            first.
        """
        Patch.check([patch for _, patch in self.patches])
        while self.patches:
            self.patches.pop()[1].close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        if not self.patches:
            return "hasten: removed"
        lines = [f"hasten: {_headline(self.recipe)}"]
        for label, patch in self.patches:
            if label == "guard":
                continue
            hits = ", ".join(f"{k} {n}" for k, n in sorted(patch.tally.items()))
            lines.append(f"  {label}: {len(patch.sites)} places" + (f"; {hits}" if hits else ""))
        if self.clock is not None and self.clock.calls:
            each = 1000 * self.clock.seconds / self.clock.calls
            ran, reused = (sum(p.tally[k] for _, p in self.patches) for k in ("ran", "reused"))
            saved = f", {reused / (ran + reused):.0%} of block runs saved" if reused else ""
            lines.append(
                f"  since then: {self.clock.trajectories} trajectories, {self.clock.calls} network calls"
                f" of {each:.1f} ms{saved}"
            )
            if reused and (gain := self.clock.gain()) is not None:
                slower = "; slower than without: leave it out" if gain < 1 else ""
                lines.append(f"  reuse: {(ran + reused) / max(1, ran):.2f}x foretold, {gain:.2f}x measured{slower}")
        return "\n".join(lines)


def _headline(recipe: Recipe) -> str:
    parts = [
        recipe.solver if recipe.solver is None else recipe.solving().name,
        f"{recipe.steps} steps" if recipe.steps else None,
        *(m.label() for m in recipe.all_methods()),
    ]
    return ", ".join(p for p in parts if p) or "an empty recipe"


def accelerate(thing: Any, recipe: Recipe | str | os.PathLike[str]) -> Handle:
    """Puts `recipe` on a diffusers pipeline, or, where it has methods alone, on a bare network, in place.

    The pipeline stays the ordinary one: steps and guidance scale of the recipe are defaults that a call's own
    arguments override.

    Raises:
        RecipeError: the recipe file is wrong, or it needs a pipeline and got a network.
        Refused: a method can't work on this network, device or machine; nothing was changed.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if pipelines.is_pipeline(thing):
        clock, patches = pipelines.put(thing, recipe)
        return Handle(recipe, [*patches, ("guard", _guard(thing, *pipelines.networks(thing).values()))], clock)
    if isinstance(thing, nn.Module):
        patches = [(m.label(), patch) for m, patch in recipe.apply(thing)]
        return Handle(recipe, [*patches, ("guard", _guard(thing))], None)
    raise RecipeError(f"accelerate takes a diffusers pipeline or a torch module, not a {type(thing).__name__}")


def _guard(*things: Any) -> Patch:
    """Refuses what would take edits for the original: a copy would share them, a folder would hold their weights."""

    def told(what: str) -> Any:
        def no(*args: Any, **kwargs: Any) -> Any:
            raise RecipeError(
                f"this is accelerated, and {what}: call handle.remove() first, and put the recipe on again"
            )

        return no

    with Patch() as patch:
        for thing in things:
            patch.set(thing, "__deepcopy__", told("a copy would share its edits"))
            if hasattr(thing, "save_pretrained"):
                patch.set(thing, "save_pretrained", told("what is saved would be its edited weights"))
        return patch.keep()


def save(pipe: Any, recipe: Recipe, folder: str | os.PathLike[str]) -> None:
    """The untouched pipeline and its recipe in one folder, which plain diffusers loads too.

    Raises:
        RecipeError: the pipeline is accelerated; remove the handle first, so that what is saved is the original.
    """
    folders.write(pipe, File(folder))
    recipe.save(File(folder) / RECIPE)


def load(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The pipeline of `folder`, with its recipe put on where it has one: the same bits as before `save`.

    The handle is `pipe.hasten`. Further arguments go to `DiffusionPipeline.from_pretrained`.
    """
    pipe = folders.read(folder, **kwargs)
    if (File(folder) / RECIPE).exists():
        vars(pipe)["hasten"] = accelerate(pipe, File(folder) / RECIPE)
    return pipe
