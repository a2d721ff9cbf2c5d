"""When to recompute: what reusing costs, measured once on the user's own model, and spent where it buys most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hasten.bridge.drawing import latents
from hasten.bridge.pipelines import put
from hasten.cache.planned import Planned
from hasten.fit.probe import FARTHEST, Probe
from hasten.fit.shortest import shortest
from hasten.method import Method, conflict
from hasten.recipe import Recipe

SEARCH = 24
"""Runs that try whether a plan of fewer evaluations is within the budget with its steps moved."""

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
        measured: distance of the latents from those without the plan, over their norm, root mean square over pictures.
        computed, steps: network evaluations that run in full, and all.
    """

    recipe: Recipe
    foretold: float
    measured: float
    computed: int
    steps: int


def plan(
    pipe: Any, prompts: Sequence[str], budget: float, base: Recipe | None = None, *, seed: int = 0, branch: int = 0,
    farthest: int = FARTHEST, search: int = SEARCH, batch: int = 8, tick: Callable[[int], None] = lambda n: None,
    **call: Any,
) -> Plan:  # fmt: skip
    """The fewest full evaluations whose pictures stay within `budget` of those without reuse.

    Args:
        budget: relative distance of the latents, over their norm, root mean square over the prompts' pictures.
        base: solver, steps, guidance and methods that the plan is for; it holds no cache.
        branch: of a U-Net, the skip that stays outside.
        search: the most runs that moving single steps takes.
        tick: told of each run of all prompts.
        call: any argument of `pipe(...)`.

    Raises:
        CannotPlan: the recipe has a cache already, or no plan is within the budget.
    """
    return measured(pipe, prompts, base, seed=seed, branch=branch, farthest=farthest, batch=batch, tick=tick,
                    **call).plan(budget, search)  # fmt: skip


def measured(
    pipe: Any, prompts: Sequence[str], base: Recipe | None = None, *, seed: int = 0, branch: int = 0,
    farthest: int = FARTHEST, batch: int = 8, tick: Callable[[int], None] = lambda n: None, **call: Any,
) -> Costs:  # fmt: skip
    """What reusing costs this pipeline, for plans of any budget.

    One run measures, for every two steps, how far the end of the step moves if the later one reuses what the earlier
    one kept (`Probe`). `PARTS` runs, each with every other step of one part reused, tell how much of such moves is left
    at the end.

    Raises:
        CannotPlan: the recipe has a cache already.
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

    costs = Costs(base, probe, ends, ends(probe))
    costs.weigh()
    return costs


@dataclass
class Costs:
    """Measured costs of reuse.

    Attributes:
        base: what they are of.
        ends: methods -> the latents that the prompts end in with them, [N, ...].
        want: those without reuse.
        weights: of each evaluation, how much of its error is left at the end, over the latents' norm.
        tried: full evaluations -> (distance, plan), what was tried so far.
    """

    base: Recipe
    probe: Probe
    ends: Callable[..., Tensor]
    want: Tensor
    weights: list[float] = field(default_factory=list)
    tried: dict[int, tuple[float, Planned]] = field(default_factory=dict)

    def weigh(self) -> None:
        """Finds the weights, by a run for each part."""
        steps = self.probe.steps
        self.weights, plain = [0.0], self.probe.table([1.0] * steps)
        for part in range(PARTS):
            begin, end = (round(1 + (steps - 1) * p / PARTS) for p in (part, part + 1))
            spared = [k for k in range(begin, end, 2) if plain[k - 1, k + 1] < torch.inf]
            compute = [k for k in range(steps) if k not in spared]
            cost = summed(plain, [*compute, steps])
            real = self.distance(compute)[0] if cost else 0.0
            self.weights += [real / cost if cost else 1.0] * (end - begin)

    def plan(self, budget: float, search: int = SEARCH) -> Plan:
        """The fewest full evaluations within `budget`. Dynamic programming has, for every number of them, those whose
        costs sum least; costs do not add up exactly, so the number is found by halving, on the real distance (five runs
        or so), and then fewer are tried with single steps moved to where the distance is less.

        Args:
            search: the most runs that moving takes; 0 leaves the steps as they are.

        Raises:
            CannotPlan: no plan is within the budget.
        """
        steps, table = self.probe.steps, self.probe.table(self.weights)
        fewest = -(-steps // (self.probe.farthest + 1))
        low, high = max(1, fewest - 1), steps  # too few for sure or by trial; enough by trial or for sure
        while high - low > 1:
            middle = (low + high) // 2
            enough = self._possible(table, middle) and self._try(table, middle) <= budget
            low, high = (low, middle) if enough else (middle, high)
        if high == steps or high not in self.tried:
            raise CannotPlan(
                f"no step can be spared within {budget}: the least that one costs is {least(table):.3g}; allow more"
            )
        left = search
        while left > 0 and high > fewest and self._possible(table, high - 1):
            left = self._move(table, high - 1, budget, left)
            if self.tried[high - 1][0] > budget:
                break
            high -= 1
        measured, chosen = self.tried[high]
        recipe = self.base.model_copy(update={"methods": (*self.base.methods, chosen)})
        return Plan(recipe, summed(table, [*chosen.compute, steps]), measured, high, steps)

    def _move(self, table: Tensor, count: int, budget: float, left: int) -> int:
        """Moves single steps of the plan of so many evaluations while that brings it nearer, those first that the table
        finds cheapest, until it is within the budget; how many of the runs `left` are left."""
        self._try(table, count)
        seen: set[tuple[int, ...]] = set()
        ways = self._moved(table, count)
        while left > 0 and self.tried[count][0] > budget and (way := next((w for w in ways if w not in seen), None)):
            seen.add(way)
            left -= 1
            if (found := self.distance(way))[0] < self.tried[count][0]:
                self.tried[count] = found
                ways = self._moved(table, count)
        return left

    def _moved(self, table: Tensor, count: int) -> list[tuple[int, ...]]:
        """The plans that one step earlier or later makes of the best one of so many evaluations, the cheapest first."""
        steps, compute = self.probe.steps, self.tried[count][1].compute
        taken = set(compute)
        ways = [
            tuple(sorted(taken - {k} | {j}))
            for k in compute[1:]
            for j in (k - 1, k + 1)
            if j not in taken and j < steps
        ]
        costs = {w: summed(table, [*w, steps]) for w in ways}
        return sorted((w for w in ways if costs[w] < torch.inf), key=costs.__getitem__)

    def distance(self, compute: Sequence[int]) -> tuple[float, Planned]:
        """How far a plan moves the latents, and the plan."""
        chosen = Planned(compute=tuple(compute), steps=self.probe.steps, branch=self.probe.branch)
        moved = (self.ends(chosen) - self.want).norm(dim=1) / self.want.norm(dim=1)
        return float(moved.square().mean().sqrt()), chosen

    def _try(self, table: Tensor, count: int) -> float:
        if count not in self.tried:
            self.tried[count] = self.distance(shortest(table, count)[:-1])
        return self.tried[count][0]

    def _possible(self, table: Tensor, count: int) -> bool:
        return summed(table, shortest(table, count)) < torch.inf


def summed(table: Tensor, way: Sequence[int]) -> float:
    """What the jumps of a way cost."""
    return float(sum(table[i, j] for i, j in pairwise(way)))


def least(table: Tensor) -> float:
    """What the cheapest single reuse costs."""
    return min((float(table[i, i + 2]) for i in range(len(table) - 2)), default=torch.inf)
