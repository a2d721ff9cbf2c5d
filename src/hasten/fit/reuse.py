"""When to recompute: what reusing costs, measured once on the user's own model, and spent where it buys most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from hasten import moment
from hasten.bridge.drawing import latents
from hasten.bridge.pipelines import put
from hasten.cache.planned import Planned, reused
from hasten.denoiser import Prediction
from hasten.fit.shortest import shortest
from hasten.halves import Conditional, said, split
from hasten.method import Method, Part, Stage, conflict
from hasten.moment import Moment, now
from hasten.patch import Patch
from hasten.recipe import Recipe

FARTHEST = 8
"""Steps over which a reuse is measured, and the longest that a plan reuses."""

PARTS = 4
"""Of a trajectory, whose errors are weighed apart: what comes early is in part mended by the steps that follow."""


class CannotPlan(ValueError):
    """A recipe or budget for which there is no plan; one line."""


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        recipe: the one that was given, with the plan among its methods.
        foretold: sum over the reused steps of what each was measured to cost alone.
        measured: distance of the latents from those without the plan, over their norm, mean over pictures.
        computed, steps: network evaluations that run in full, and all.
    """

    recipe: Recipe
    foretold: float
    measured: float
    computed: int
    steps: int


class Probe(Method):
    """Measures: every evaluation runs once in full, and once on what each of the last steps kept. Each step keeps its
    own under a branch of its own, so that the caches' own rules do the rest; what the pipeline gets is the full
    answer."""

    stage: ClassVar = Stage.CACHE
    writes: ClassVar = frozenset({Part.SCHEDULE})

    branch: int = Field(0, ge=0)
    farthest: int = Field(FARTHEST, ge=1)
    _costs: dict[tuple[int, int], float] = PrivateAttr(default_factory=dict)
    _steps: list[int] = PrivateAttr(default_factory=list)

    def apply(self, model: nn.Module) -> Patch:
        cond = Conditional()

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            here = now()

            def run(step: int) -> Any:
                with moment.at(replace(here, branch=f"{here.branch} {step}")):  # type: ignore[arg-type]
                    return forward(*args, **kwargs)

            answer = run(here.step)
            out, before = said(answer), mine.get(here.branch, [])
            off = {i: said(run(i)) - out for i in before[-self.farthest :] if i >= here.step - self.farthest}
            mine[here.branch] = [*before, here.step] if here.step else [0]
            self._steps.append(here.steps)
            match here.branch:
                case "cond" if here.scale is not None and here.scale > 1:
                    cond.keep(here, off)  # told with the unconditional answer, which comes next
                    return answer
                case "uncond" if (first := cond.take(here)) is not None:
                    off = {i: _guided(e, first[i], here) for i, e in off.items() if i in first}
                case "both":
                    off = {i: _guided(*split(e), here) for i, e in off.items()}
            if here.branch != "other":
                for i, error in off.items():
                    pair = i, here.step
                    self._costs[pair] = self._costs.get(pair, 0.0) + _moved(here, error)
            return answer

        mine: dict[str, list[int]] = {}  # steps that this network ran at, a branch
        with Patch() as patch:
            reused(patch, model, lambda here: True, self.branch)
            patch.wrap(model, around)
            return patch.keep()

    @property
    def steps(self) -> int:
        """Evaluations of a picture."""
        return max(self._steps)

    def table(self, weights: list[float]) -> Tensor:
        """[T + 1, T + 1]: of running at step i and next at step j, the sum of what each step k between costs, times
        weights[k]; infinite where it was not measured."""
        steps = self.steps
        table = torch.full((steps + 1, steps + 1), torch.inf, dtype=torch.float64)
        for i in range(steps):
            total = 0.0
            table[i, i + 1] = 0.0
            for k in range(i + 1, min(steps, i + self.farthest + 1)):
                if (i, k) not in self._costs:
                    break
                total += self._costs[i, k] * weights[k]
                table[i, k + 1] = total
        return table


def _guided(u: Tensor, c: Tensor, here: Moment) -> Tensor:
    return c if here.scale is None else u + here.scale * (c - u)


def _moved(here: Moment, error: Tensor) -> float:
    """How far an error of the network's answer moves the end of a first-order step, summed over rows."""
    node, target = here.node, here.target
    error = error.float()
    if node is not None and target is not None and node.end is not None:
        p = Prediction.of(target, error, torch.zeros_like(error), node)
        error = p.mix(x0=node.end.alpha, eps=node.end.sigma)
    return float(error.flatten(1).norm(dim=1).sum())


def plan(
    pipe: Any, prompts: Sequence[str], budget: float, base: Recipe | None = None, *, seed: int = 0, branch: int = 0,
    farthest: int = FARTHEST, batch: int = 8, tick: Callable[[int], None] = lambda n: None, **call: Any,
) -> Plan:  # fmt: skip
    """The fewest full evaluations whose pictures stay within `budget` of those without reuse.

    One run measures, for every two steps, how far the end of the step moves if the later one reuses what the earlier
    one kept. `PARTS` runs, each with every other step of one part reused, tell how much of such moves is left at the
    end. From that table dynamic programming (`fit.shortest`) has, for every number of full evaluations, the steps whose
    costs sum least. Costs do not add up exactly, so the number is found by halving, on the real distance: five runs or
    so.

    Args:
        budget: relative distance of the latents, over their norm, mean over the prompts' pictures.
        base: solver, steps, guidance and methods that the plan is for; it holds no cache.
        branch: of a U-Net, the skip that stays outside.
        tick: told of each run of all prompts.
        call: any argument of `pipe(...)`.

    Raises:
        CannotPlan: the recipe has a cache already, or no plan is within the budget.
    """
    base, seeds = base or Recipe.from_dict({}), [seed + i for i in range(len(prompts))]
    probe = Probe(branch=branch, farthest=farthest)
    if (why := conflict([*base.all_methods(), probe])) is not None:
        raise CannotPlan(f"the recipe has a cache already: {why.split(' and ')[0]}; leave it out")

    def ends(*more: Method) -> Tensor:
        _, patches = put(pipe, base.model_copy(update={"methods": (*base.methods, *more)}))
        try:
            made = latents(pipe, prompts, seeds, batch, **call)
        finally:
            for _, patch in reversed(patches):
                patch.close()
        tick(1)
        return made.flatten(1).double()

    want = ends(probe)
    size, steps = want.norm(dim=1), probe.steps
    tried: dict[int, tuple[float, Planned]] = {}

    def distance(compute: Sequence[int]) -> tuple[float, Planned]:
        chosen = Planned(compute=tuple(compute), steps=steps, branch=branch)
        return float(((ends(chosen) - want).norm(dim=1) / size).mean()), chosen

    plain, weights = probe.table([1.0] * steps), []
    for part in range(PARTS):
        begin, end = (round(1 + (steps - 1) * p / PARTS) for p in (part, part + 1))
        spared = [k for k in range(begin, end) if (k - begin) % 2 == 0 and bool(plain[k - 1, k + 1].isfinite())]
        cost = float(sum(plain[k - 1, k + 1] for k in spared))
        real = distance([k for k in range(steps) if k not in spared])[0] if cost else 0.0
        weights += [real / cost if cost else 1.0] * (end - begin)
    table = probe.table([1.0, *weights])

    def off(count: int) -> float:
        tried[count] = distance(shortest(table, count)[:-1])
        return tried[count][0]

    fewest = -(-steps // (farthest + 1))
    low, high = max(1, fewest - 1), steps  # too few for sure or by trial; enough by trial or for sure
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _possible(table, middle) and off(middle) <= budget else (middle, high)
    if high == steps or high not in tried:
        raise CannotPlan(
            f"no step can be spared within {budget}: the least that one costs is {least(table):.3g}; allow more"
        )
    measured, chosen = tried[high]
    compute = list(chosen.compute)
    foretold = float(sum(table[a, b] for a, b in zip(compute, [*compute[1:], steps], strict=True)))
    recipe = base.model_copy(update={"methods": (*base.methods, chosen)})
    return Plan(recipe, foretold, measured, high, steps)


def _possible(table: Tensor, count: int) -> bool:
    way = shortest(table, count)
    return all(bool(table[a, b].isfinite()) for a, b in pairwise(way))


def least(table: Tensor) -> float:
    """What the cheapest single reuse costs."""
    return float(table.diagonal(2).min()) if len(table) > 2 else torch.inf
