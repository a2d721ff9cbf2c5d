"""What is measured on a pipeline is what its network did, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from compatible import fingerprint
from families import FAMILIES
from hasten import Recipe
from hasten.cache import block, magnitude, tea
from hasten.fit.record import record
from hasten.method import Refused
from pipelines import PIPELINES

SD3 = FAMILIES[2]
STEPS = 8


def given() -> dict[str, Any]:
    named = {k: v for k, v in SD3.inputs().items() if k not in ("generator", "prompt")}
    return named | {"num_inference_steps": STEPS}


def by_hand(pipe: Any, watch: Any) -> Any:
    patch, found = watch(pipe.transformer)
    with patch, hasten.accelerate(pipe, Recipe.from_dict({})):
        pipe(generator=[torch.Generator().manual_seed(0)], output_type="latent", **given())
    return found


@pytest.mark.parametrize("label", ["cache.tea", "cache.magnitude", "cache.block"])
def test_a_recipe_holds_what_a_run_by_hand_measures(label: str) -> None:
    pipe = SD3.build()
    SD3.call(pipe)  # a pipeline's first call leaves attributes of its own
    before = fingerprint(pipe)
    base = Recipe.from_dict({"solver": "euler", "methods": ["tokens.fold"]})
    found = record(pipe, [""], label, base, settings={"delta": 0.5} if label == "cache.block" else {}, **given())
    assert fingerprint(pipe) == before
    assert [m.label() for m in found.methods] == ["tokens.fold", label]
    assert found.solver == base.solver
    method: Any = found.methods[-1]
    plain = record(pipe, [""], label, **given()).methods[-1]
    match label:
        case "cache.tea":
            want = tea.fit(by_hand(pipe, tea.record))
            assert plain.coefficients == pytest.approx(want)  # type: ignore[attr-defined]
            assert len(method.coefficients) == 5
        case "cache.magnitude":
            want = magnitude.mean(list(by_hand(pipe, magnitude.record).done.values()))
            assert plain.ratios == pytest.approx(want)  # type: ignore[attr-defined]
            assert len(method.ratios) == STEPS - 1
        case "cache.block":
            assert plain.table == by_hand(pipe, block.measure).table()  # type: ignore[attr-defined]
            assert method.delta == 0.5
    with hasten.accelerate(pipe, Recipe.from_dict(found.to_dict())):
        SD3.call(pipe, num_inference_steps=STEPS)


def test_what_cannot_be_recorded_is_said_in_a_line() -> None:
    pipe = SD3.build()
    with pytest.raises(ValueError, match=r"cache\.interval has nothing to record; these have: cache\.block"):
        record(pipe, [""], "cache.interval", **given())
    with pytest.raises(Refused, match="both write the schedule"):
        record(pipe, [""], "cache.tea", Recipe.from_dict({"methods": ["cache.interval"]}), **given())
    with pytest.raises(ValueError, match="came to its end"):
        record(pipe, [""], "cache.magnitude", **given() | {"num_inference_steps": 1})
    two = next(f for f in PIPELINES if f.name == "wan22")
    with pytest.raises(Refused, match="has 2 networks"):
        record(two.build(), [""], "cache.tea", num_inference_steps=2)
