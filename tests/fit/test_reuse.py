"""Plans of when to recompute: what was measured is what happens, and the budget holds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from compatible import fingerprint
from families import FAMILIES, Family
from hasten import Recipe, moment
from hasten.bridge.drawing import latents
from hasten.bridge.pipelines import networks
from hasten.cache.planned import Planned
from hasten.denoiser import Prediction
from hasten.fit.probe import Probe
from hasten.fit.reuse import PARTS, CannotPlan, Costs, measured, plan, summed
from hasten.halves import said
from hasten.moment import Moment
from pipelines import PIPELINES

NAMED = {f.name: f for f in PIPELINES}
NONE = Recipe.from_dict({})


def wanted(family: Family, steps: int = 6) -> dict[str, Any]:
    return {k: v for k, v in family.inputs().items() if k != "generator"} | {"num_inference_steps": steps}


def probed(family: Family, pipe: Any, **settings: int) -> Probe:
    probe = Probe(**settings)
    with hasten.accelerate(pipe, NONE.model_copy(update={"methods": (probe,)})):
        family.call(pipe)
    return probe


@pytest.mark.parametrize("name", ["sd3", "wan", "sd"])
def test_a_cost_is_the_move_of_a_step_on_what_an_older_one_kept(name: str) -> None:
    """Recomputed from recorded inputs with the method itself, guidance and first-order step by hand: of branches in one
    batch, and in two calls."""
    family = NAMED[name]
    pipe = family.build()
    probe = probed(family, pipe)
    for i, k in ((2, 3), (0, 1), (0, 2)):
        assert probe.cost(i, k) == pytest.approx(cost(family, i, k), rel=1e-3)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_row_of_the_table_sums_what_its_steps_cost(name: str) -> None:
    family = NAMED[name]
    probe = probed(family, family.build())
    table = probe.table([1.0, 1.0, 1.0, 2.0, 3.0, 1.0])
    assert table.shape == (7, 7)
    assert float(table[2, 5]) == pytest.approx(2 * probe.cost(2, 3) + 3 * probe.cost(2, 4))
    assert [float(table[i, i + 1]) for i in range(6)] == [0] * 6


def test_weights_are_what_is_left_of_a_part_s_errors_at_the_end() -> None:
    """So what is foretold of a plan that spares one part's steps is what it measures."""
    family = NAMED["sd3"]
    costs = measured(family.build(), [""], **{k: v for k, v in wanted(family, 9).items() if k != "prompt"})
    compute = [0, 1, 2, 4, 5, 6, 7, 8]  # the second part, from step 3 on
    foretold = summed(costs.probe.table(costs.weights), [*compute, 9])
    assert costs.distance(compute)[0] == pytest.approx(foretold, rel=1e-6)
    assert len(set(costs.weights)) == PARTS + 1


def cost(family: Family, i: int, k: int) -> float:
    pipe = family.build()
    (net,) = networks(pipe).values()
    seen: list[tuple[Moment, tuple[Any, ...], dict[str, Any], Tensor]] = []
    inner = net.forward

    def note(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        seen.append((moment.now(), args, kwargs, said(out).clone()))
        return out

    net.forward = note
    with hasten.accelerate(pipe, NONE):
        family.call(pipe)
    del net.forward
    off: dict[str, Tensor] = {}
    with Planned(compute=tuple(range(i + 1)), steps=6).apply(net), torch.no_grad():
        for here, args, kwargs, out in seen:
            if here.step in (i, k):
                with moment.at(here):
                    off[here.branch] = said(net(*args, **kwargs)) - out
    here = next(h for h, *_ in seen if h.step == k)
    u, c = off["both"].chunk(2) if "both" in off else (off["uncond"], off["cond"])
    assert here.scale is not None
    error = u + here.scale * (c - u)
    assert here.node is not None
    assert here.target is not None
    assert here.node.end is not None
    p = Prediction.of(here.target, error, torch.zeros_like(error), here.node)
    return float((here.node.end.alpha * p.x0 + here.node.end.sigma * p.eps).flatten(1).norm(dim=1).sum())


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_a_plan_keeps_its_budget_and_more_budget_spares_more(name: str) -> None:
    """The distance that it tells is the one that its recipe has, and the pipeline is left as it was."""
    family = NAMED[name]
    pipe = family.build()
    given = {k: v for k, v in wanted(family, 10).items() if k != "prompt"}
    ends = latents(pipe, [""], [0], **given).flatten()
    before = fingerprint(pipe)
    computed = []
    for budget in (0.002, 0.02, 0.2):
        try:
            found = plan(pipe, [""], budget, **given)
        except CannotPlan:
            assert budget < 0.2
            continue
        assert found.steps == 10
        assert found.measured <= budget
        assert fingerprint(pipe) == before
        with hasten.accelerate(pipe, Recipe.from_dict(found.recipe.to_dict())):
            got = latents(pipe, [""], [0], **given).flatten()
        assert float((got - ends).norm() / ends.norm()) == pytest.approx(found.measured, rel=1e-4)
        (method,) = found.recipe.methods
        assert isinstance(method, Planned)
        assert len(method.compute) == found.computed < 10
        computed.append(found.computed)
    assert computed
    assert all(a >= b for a, b in pairwise(computed))


class Even:
    """In the place of a probe: every skipped step costs more than the one before it, whichever they are."""

    steps, branch, farthest = 8, 0, 8

    def table(self, weights: object) -> Tensor:
        i = torch.arange(9.0)
        return torch.where(i > i[:, None], (i - i[:, None] - 1) ** 2, torch.inf).double()


def test_a_step_moved_spares_one_that_the_table_would_not() -> None:
    """Where running at step 2 is worth nothing unless most others run, of which the table knows nothing: found within
    the runs allowed."""
    tried: list[tuple[int, ...]] = []

    def ends(method: Planned) -> Tensor:
        tried.append(method.compute)
        gaps = [b - a - 1 for a, b in pairwise((*method.compute, 8))]
        return torch.ones(1, 1) * (1 + sum(g**2 for g in gaps) / 100 + 0.2 * (2 in method.compute and len(gaps) < 6))

    costs = Costs(NONE, Even(), ends, torch.ones(1, 1), [0.0] * 8)  # type: ignore[arg-type]
    plain = costs.plan(0.1, search=0)
    assert len(tried) <= 3
    assert costs.plan(0.1, search=0) == plain
    moved = costs.plan(0.1, search=12)
    assert moved.computed < plain.computed
    assert moved.measured <= 0.1
    assert len(tried) <= 3 + 3 + 12
    (method,) = moved.recipe.methods
    assert isinstance(method, Planned)
    assert 2 not in method.compute
    assert moved.measured == pytest.approx(float(ends(method) - 1))


def test_a_second_network_starts_with_an_evaluation_in_full() -> None:
    """It has kept nothing when its turn comes: what the first kept is not its own, and was never measured for it."""
    family = NAMED["wan22"]
    probe = probed(family, family.build())
    table = probe.table([1.0] * probe.steps)
    turns = [k for k in range(1, 6) if not table[k - 1, k + 1].isfinite()]
    assert len(turns) == 1


def test_what_cannot_be_planned_is_said_in_a_line() -> None:
    family = NAMED["sd3"]
    pipe = family.build()
    with pytest.raises(CannotPlan, match="has a cache already"):
        plan(pipe, [""], 0.1, Recipe.from_dict({"methods": ["cache.interval"]}), **wanted(family))
    with pytest.raises(CannotPlan, match=r"no step can be spared within 0: the least that one costs is .*; allow more"):
        plan(pipe, [""], 0, **wanted(family))


def test_the_table_is_infinite_beyond_what_was_measured() -> None:
    family = FAMILIES[2]
    probe = probed(family, family.build(), farthest=2)
    table = probe.table([1.0] * 6)
    assert torch.isfinite(table).sum(1).tolist() == [3, 3, 3, 3, 2, 1, 0]
    weighed = probe.table([1.0, 1.0, 5.0, 1.0, 1.0, 1.0])
    assert float(weighed[1, 3]) == pytest.approx(5 * float(table[1, 3]))
    assert float(weighed[2, 4]) == float(table[2, 4])
