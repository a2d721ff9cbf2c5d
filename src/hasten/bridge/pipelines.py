"""Puts a recipe into an ordinary diffusers pipeline, reversibly."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from hasten.bridge.clock import Clock
from hasten.bridge.process import process
from hasten.bridge.scheduler import Lay, SolverScheduler
from hasten.bridge.sizes import Sizes
from hasten.grid import at, build
from hasten.method import apply_all
from hasten.patch import Patch
from hasten.recipe import Recipe, RecipeError

NETWORKS = ("unet", "transformer", "transformer_2")
NEGATES = ("Lumina", "ZImage", "HiDream", "NucleusMoE")
"""Pipelines whose class starts so negate what their network says before they step."""
TURNED = ("DiTPipeline", "LuminaPipeline", "LuminaText2ImgPipeline")
"""Pipelines that put the conditional half of a batch before the unconditional."""
NORMALISES = ("QwenImage",)
"""Pipelines whose class starts so change the length of what they guided; others where `cfg_normalization` says so."""


def is_pipeline(thing: object) -> bool:
    """Whether it is a diffusers pipeline."""
    return isinstance(thing, DiffusionPipeline)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The denoising networks of a pipeline, by component name; one that fills two places, once.

    Raises:
        RecipeError: it has none that hasten knows.
    """
    found: dict[str, nn.Module] = {}
    for name in NETWORKS:
        net = getattr(pipe, name, None)
        if isinstance(net, nn.Module) and not any(net is other for other in found.values()):
            found[name] = net
    if not found:
        raise RecipeError(f"{type(pipe).__name__} has no {' or '.join(NETWORKS)}, the networks that hasten works on")
    return found


def put(pipe: Any, recipe: Recipe) -> tuple[Clock, list[tuple[str, Patch]]]:
    """Applies `recipe` to `pipe` in place: its methods to each network, its solver as the scheduler, its steps and
    scale as the defaults of `pipe(...)`. A failure half way takes back what was done.

    Returns:
        the clock that runs in it, and (label, patch) in the order applied.
    """
    nets = networks(pipe)
    done: list[tuple[str, Patch]] = []
    try:
        for name, net in nets.items():
            done += [(f"{m.label()} on {name}", patch) for m, patch in apply_all(recipe.all_methods(), net)]
        done.append(("scheduler", _scheduler(pipe, recipe, list(nets.values()))))
        try:
            known = process(_base(pipe.scheduler))
        except ValueError:
            known = None
        kind = type(pipe).__name__
        clock = Clock(known, kind.startswith(NEGATES), kind in TURNED)
        clock.tallies = [patch.tally for _, patch in done]
        done.append(("clock", clock.install(pipe.scheduler, list(nets.values()))))
        done.append(("defaults", _defaults(pipe, recipe, clock)))
    except BaseException:
        for _, patch in reversed(done):
            patch.close()
        raise
    return clock, done


def _scheduler(pipe: Any, recipe: Recipe, nets: list[nn.Module]) -> Patch:
    with Patch() as patch:
        solver = recipe.solving()
        if solver is not None:
            sizes = Sizes(type(pipe).__name__) if solver.resizes else None
            solver = solver if sizes is None else sizes.around(solver)
            try:
                base, refines = _base(pipe.scheduler), recipe.noise == "path"
                patch.set(pipe, "scheduler", SolverScheduler(base, solver, _lay(recipe), refines))
            except ValueError as error:
                raise RecipeError(str(error)) from None
            if sizes is not None:
                sizes.watch(patch, pipe, nets)
        return patch.keep()


def _base(scheduler: Any) -> Any:
    """The pipeline's own scheduler, also where an older handle has put a solver in its place."""
    return scheduler.base if isinstance(scheduler, SolverScheduler) else scheduler


def _lay(recipe: Recipe) -> Lay | None:
    if isinstance(recipe.grid, tuple):
        times = recipe.grid

        def fixed(path: Any, steps: int) -> Any:
            if steps != len(times) - 1:
                raise ValueError(f"the recipe's grid has {len(times) - 1} steps; {steps} were asked for")
            return at(path, times)

        return fixed
    named = recipe.spacing()
    if named is None:
        return None
    spacing, settings = named
    return lambda path, steps: build(path, spacing, steps, **settings)


def _defaults(pipe: Any, recipe: Recipe, clock: Clock) -> Patch:
    """A class of its own for this pipeline, whose call has the recipe's steps and scale where the user gives none."""
    plain = type(pipe).__call__
    known = inspect.signature(plain).parameters
    steps = recipe.steps if not isinstance(recipe.grid, tuple) else len(recipe.grid) - 1
    wanted = {"num_inference_steps": steps, "guidance_scale": recipe.guidance.scale}
    wanted = {k: v for k, v in wanted.items() if v is not None}
    if missing := [k for k in wanted if k not in known]:
        raise RecipeError(f"{type(pipe).__name__} takes no {' or '.join(missing)}; leave it out of the recipe")

    @functools.wraps(plain)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(plain).bind(self, *args, **kwargs).arguments
        if given.get("timesteps") is None and given.get("sigmas") is None:
            kwargs |= {k: v for k, v in wanted.items() if k not in given}
        else:
            kwargs |= {k: v for k, v in wanted.items() if k not in given and k != "num_inference_steps"}
        told = {k: p.default for k, p in known.items()} | given | kwargs
        scale = told.get("true_cfg_scale", told.get("guidance_scale"))
        second = told.get("guidance_scale_2")  # of Wan 2.2's second network
        plain_sum = not (told.get("cfg_normalization") or type(pipe).__name__.startswith(NORMALISES))
        clock.scales = (scale, scale if second is None else second) if plain_sum else (None,)
        clock.guided = scale is not None and scale > 1
        if isinstance(self.scheduler, SolverScheduler):
            self.scheduler.generator = given.get("generator")
        return plain(self, *args, **kwargs)

    members: dict[str, Any] = {"__call__": call}
    if hasattr(pipe, "prepare_latents"):
        members["prepare_latents"] = _counted(type(pipe).prepare_latents, clock)
    with Patch() as patch:
        patch.extend(pipe, members)
        return patch.keep()


def _counted(prepare: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """The pipeline's `prepare_latents`, which tells the clock how many rows it made."""

    @functools.wraps(prepare)
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = prepare(self, *args, **kwargs)
        clock.rows = len(made[0] if isinstance(made, tuple | list) else made)
        return made

    return prepare_latents
