"""What reusing costs, measured on the user's own model while it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from hasten import moment
from hasten.cache.planned import reused
from hasten.denoiser import Prediction
from hasten.halves import Conditional, said, split
from hasten.method import Method, Part, Stage
from hasten.moment import Moment, now
from hasten.patch import Patch

FARTHEST = 8
"""Steps over which a reuse is measured, and the longest that a plan reuses."""


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
        mine: dict[str, list[int]] = {}  # steps that this network ran at, a branch

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

        with Patch() as patch:
            reused(patch, model, lambda here: True, self.branch)
            patch.wrap(model, around)
            return patch.keep()

    @property
    def steps(self) -> int:
        """Evaluations of a picture."""
        return max(self._steps)

    def cost(self, last: int, step: int) -> float:
        """How far the end of `step` moves where what the step `last` kept is given again, summed over pictures;
        infinite where that was not measured."""
        return self._costs.get((last, step), torch.inf)

    def table(self, weights: Sequence[float]) -> Tensor:
        """[T + 1, T + 1]: of running at step i and next at step j, the sum of what each step k between them costs,
        times weights[k]; infinite where it was not measured."""
        steps = self.steps
        table = torch.full((steps + 1, steps + 1), torch.inf, dtype=torch.float64)
        for i in range(steps):
            total = 0.0
            for j in range(i + 1, min(steps, i + self.farthest + 1) + 1):
                table[i, j] = total
                total += self.cost(i, j) * weights[j] if j < steps else 0.0
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
