"""Calls of a network at chosen steps of a pipeline's own trajectories: what quantizers are calibrated on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from hasten import labelled, moment
from hasten.bridge.drawing import latents
from hasten.bridge.pipelines import networks, put
from hasten.method import Refused
from hasten.moment import Branch, Moment
from hasten.patch import Patch
from hasten.quant.times import Times, even
from hasten.recipe import Recipe

LABEL = "calibration"


@dataclass(frozen=True)
class Sample:
    """One call of a network: what it was given, and when.

    Attributes:
        args, kwargs: tensors on the CPU, in the precision they came in.
    """

    step: int
    steps: int
    t: float
    branch: Branch
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def call(self, model: nn.Module) -> Any:
        """The call again, on the device of the network's weights, which is told the moment."""
        where = next(iter(model.parameters())).device
        args, kwargs = tree.tree_map_only(Tensor, lambda x: x.to(where), (self.args, self.kwargs))
        with moment.at(Moment(self.step, self.steps, self.t, branch=self.branch)):
            return model(*args, **kwargs)


def samples(
    pipe: Any, prompts: Sequence[str], times: Times = even, count: int = 64, *, seed: int = 0, batch: int = 1,
    tick: Callable[[int], None] = lambda n: None, **call: Any,
) -> list[Sample]:  # fmt: skip
    """`count` states at the steps that `times` draws, in turns from the trajectories of the prompts; of a pipeline
    that asks for its branches one after the other, both calls of each. A step drawn twice is there twice.

    Args:
        batch: pictures drawn at once: a sample then holds as many states, and fewer samples make up `count`.
        call: any argument of `pipe(...)`.
        tick: told 1 after each trajectory.

    Raises:
        Refused: the pipeline has two networks.
        ValueError: no prompts, or fewer than one state.
    """
    net, *more = networks(pipe).values()
    if more:
        raise Refused(f"{type(pipe).__name__} has {len(more) + 1} networks; calibration is of one: give each alone")
    if not prompts or count < 1:
        raise ValueError(f"calibration needs a prompt and a state or more, not {len(prompts)} and {count}")
    runs = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
    rng, kept = torch.Generator().manual_seed(seed), list[Sample]()
    wanted: Counter[int] | None = None

    def watch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal wanted
        here = moment.now()
        if wanted is None:
            wanted = Counter(times(here.steps, max(1, -(-count // (len(runs) * batch))), rng))
        if wanted[here.step]:
            given = tree.tree_map_only(Tensor, lambda x: x.detach().cpu().clone(), (args, kwargs))
            kept.extend([Sample(here.step, here.steps, here.t, here.branch, *given)] * wanted[here.step])
        return forward(*args, **kwargs)

    with Patch() as patch:
        patch.wrap(net, watch)
        _, patches = put(pipe, Recipe.from_dict({}))  # its clock, outside, tells the moment
        try:
            for rows in runs:
                wanted, words = None, list(prompts[rows])
                seeds = [seed + i for i in range(rows.start, rows.start + len(words))]
                latents(pipe, words, seeds, batch, **call)
                tick(1)
        finally:
            for _, each in reversed(patches):
                each.close()
    return kept


def write(file: str | os.PathLike[str], found: Sequence[Sample]) -> None:
    """All samples in one safetensors file, whole or not at all.

    Raises:
        ValueError: a sample holds what is neither a tensor nor of JSON.
    """
    tensors: dict[str, Tensor] = {}
    about = []
    for i, sample in enumerate(found):
        leaves, form = tree.tree_flatten((sample.args, sample.kwargs))
        plain = []
        for j, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                tensors[f"{i}.{j}"] = leaf
            elif leaf is not None and not isinstance(leaf, bool | int | float | str):
                raise ValueError(f"a call holds a {type(leaf).__name__}, which no file of calibration can")
            plain.append(None if isinstance(leaf, Tensor) else leaf)
        about.append([sample.step, sample.steps, sample.t, sample.branch, plain, tree.treespec_dumps(form)])
    labelled.write(file, LABEL, tensors, samples=json.dumps(about))


def read(file: str | os.PathLike[str]) -> list[Sample]:
    """What `write` wrote. Raises ValueError, in one line, where there is no such file or it is another's."""
    tensors, about = labelled.read(file, LABEL, "samples", "hasten's calibration")
    found = []
    for i, (step, steps, t, branch, plain, form) in enumerate(json.loads(about["samples"])):
        leaves = [tensors.get(f"{i}.{j}", leaf) for j, leaf in enumerate(plain)]
        args, kwargs = tree.tree_unflatten(leaves, tree.treespec_loads(form))
        found.append(Sample(step, steps, t, branch, tuple(args), kwargs))
    return found
