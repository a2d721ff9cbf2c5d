"""Settings of a method that are measured while the user's own model draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hasten import tree
from hasten.bridge.drawing import latents
from hasten.bridge.pipelines import networks, put
from hasten.method import Refused, conflict
from hasten.recipe import Recipe


def record(
    pipe: Any, prompts: Sequence[str], label: str, base: Recipe | None = None, *, seed: int = 0, batch: int = 8,
    settings: dict[str, Any] | None = None, **call: Any,
) -> Recipe:  # fmt: skip
    """`base` with the method of this label, its settings measured on pictures of the prompts: TeaCache's polynomial,
    MagCache's ratios, block caching's table. They hold for this model, and best for this number of steps.

    Args:
        settings: of the method, besides what is measured.
        call: any argument of `pipe(...)`.

    Raises:
        ValueError: the method has nothing to record, or the pictures gave too little of it.
        Refused: it does not compose with the recipe, or the pipeline has two networks.
    """
    measure = tree.recorder(label)
    base, method = base or Recipe.from_dict({}), tree.method(label)(**settings or {})
    if (why := conflict([*base.all_methods(), method])) is not None:
        raise Refused(f"{why}, so nothing is recorded")
    net, *more = networks(pipe).values()
    if more:
        raise Refused(
            f"{type(pipe).__name__} has {len(more) + 1} networks, and {label} has settings for one: leave it out"
        )
    watching, found = measure(net, method)
    with watching:  # before the recipe, whose clock then tells it the moment
        _, patches = put(pipe, base)
        try:
            latents(pipe, prompts, [seed + i for i in range(len(prompts))], batch, **call)
        finally:
            for _, patch in reversed(patches):
                patch.close()
    return base.model_copy(update={"methods": (*base.methods, found())})
