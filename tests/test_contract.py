"""The contract of every method, on every family it can apply to, found through the file tree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import hasten
from compatible import SMALL, fingerprint
from families import FAMILIES, Family
from hasten import Recipe, moment, tree
from hasten.method import Method, Refused, conflict
from hasten.moment import Moment
from settings import strong

METHODS = tree.methods()
CASES = [pytest.param(m, f, id=f"{m}-{f.name}") for m in METHODS for f in FAMILIES]


def recipe(label: str, **settings: Any) -> Recipe:
    return Recipe.from_dict({"methods": [{label: SMALL.get(label, {}) | settings}]})


def applied(pipe: Any, wanted: Recipe) -> hasten.Handle:
    try:
        return hasten.accelerate(pipe, wanted)
    except Refused as refused:
        assert len(str(refused)) > 40  # a sentence, not a word
        pytest.skip(f"refused here: {refused}")


@pytest.mark.parametrize(("label", "family"), CASES)
def test_removal_restores_bit_for_bit_and_leaves_nothing(label: str, family: Family) -> None:
    pipe = family.build()
    before = family.call(pipe)
    looks = fingerprint(pipe)
    handle = applied(pipe, recipe(label))
    if label != "runtime.compile":  # compiling tiny nets of every family costs a minute each; see test_compile
        during = family.call(pipe)
        assert during.shape == before.shape
    assert label in str(handle)
    handle.remove()
    assert fingerprint(pipe) == looks
    assert torch.equal(family.call(pipe), before)
    handle.remove()  # a second time is nothing


@pytest.mark.parametrize(("label", "family"), [c for c in CASES if METHODS[c.values[0]].neutral is not None])
def test_neutral_setting_is_exact(label: str, family: Family) -> None:
    pipe = family.build()
    before = family.call(pipe)
    with applied(pipe, recipe(label, **METHODS[label].neutral or {})):
        assert torch.equal(family.call(pipe), before)


@pytest.mark.parametrize(("label", "family"), [c for c in CASES if c.values[0] != "runtime.compile"])
def test_acts_and_is_deterministic(label: str, family: Family) -> None:
    """It changes the sample (all but the exact ones), and two images in a row are the same: no state crosses over."""
    pipe = family.build()
    before = family.call(pipe)
    with applied(pipe, recipe(label, **strong(label))) as handle:
        one, two = family.call(pipe), family.call(pipe)
        assert torch.equal(one, two)
        assert all(patch.sites for _, patch in handle.patches if _ != "scheduler")
    if label == "tokens.fold":
        assert (one - before).abs().max() < 1e-5 * before.abs().max()
    else:  # a neutral setting of none of its fields: exact always
        assert torch.equal(one, before) == (METHODS[label].neutral == {})


@pytest.mark.parametrize(("label", "family"), [c for c in CASES if c.values[0] != "runtime.compile"])
def test_two_pipelines_of_one_class_do_not_affect_each_other(label: str, family: Family) -> None:
    a, b = family.build(), family.build()
    plain = family.call(b)
    with applied(a, recipe(label, **strong(label))):
        fast = family.call(a)
        assert torch.equal(family.call(b), plain)
        other = applied(b, recipe(label, **strong(label)))
        family.call(b)
        assert torch.equal(family.call(a), fast)
        other.remove()
        assert torch.equal(family.call(b), plain)
        assert torch.equal(family.call(a), fast)


@pytest.mark.parametrize("label", METHODS)
def test_yaml_round_trip(label: str, tmp_path: Any) -> None:
    wanted = recipe(label, **strong(label))
    wanted.save(tmp_path / "r.yaml", comment="two\nlines")
    assert Recipe.load(tmp_path / "r.yaml") == wanted
    assert (tmp_path / "r.yaml").read_text().startswith("# two\n# lines\n")
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations_with_replacement(METHODS, 2)))
def test_conflicts_are_derived_from_what_is_written(a: str, b: str) -> None:
    both = METHODS[a].writes & METHODS[b].writes
    said = conflict([METHODS[a](), METHODS[b]()])
    assert (said is not None) == bool(both)
    if both:
        with pytest.raises(hasten.recipe.RecipeError, match="both write the"):
            Recipe.from_dict({"methods": [a, b]})


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_out_of_order_removal_is_refused_and_changes_nothing(family: Family) -> None:
    pipe = family.build()
    before = family.call(pipe)
    first = hasten.accelerate(pipe, recipe("cache.interval", every=2))
    second = hasten.accelerate(pipe, recipe("runtime.bf16"))
    during = family.call(pipe)
    with pytest.raises(RuntimeError, match="remove that one first"):
        first.remove()
    assert torch.equal(family.call(pipe), during)
    second.remove()
    first.remove()
    assert torch.equal(family.call(pipe), before)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states))


class Net(nn.Module):
    """A bare network: hasten knows nothing of it but that its blocks repeat."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


CACHES = [m for m in METHODS if m.startswith("cache.")]


def bare(method: Method, net: nn.Module) -> Any:
    try:
        return method.apply(net)
    except Refused as refused:
        pytest.skip(f"refused on a bare network: {refused}")


@pytest.mark.parametrize("label", CACHES)
def test_step_0_never_reads_state(label: str) -> None:
    net, method = Net(), METHODS[label](**strong(label))
    x, y = torch.randn(2, 8), torch.randn(2, 8)
    fresh = net(y)
    with bare(method, net):
        for step in range(3):
            with moment.at(Moment(step, 6, run=1)):
                net(x)
        with moment.at(Moment(0, 6, run=2)):
            assert torch.equal(net(y), fresh)
        assert torch.equal(net(y), fresh)  # outside a driven loop every call is a first step


@pytest.mark.parametrize("label", CACHES)
def test_branches_never_mix(label: str) -> None:
    """Two branches interleaved give what each gives alone."""
    net, method = Net(), METHODS[label](**strong(label))
    x = {"cond": torch.randn(2, 8), "uncond": torch.randn(2, 8)}

    def trajectory(branches: list[str], run: int) -> dict[str, list[torch.Tensor]]:
        out: dict[str, list[torch.Tensor]] = {b: [] for b in branches}
        for step in range(5):
            for b in branches:
                with moment.at(Moment(step, 6, run=run, branch=b)):  # type: ignore[arg-type]
                    out[b].append(net(x[b] + 0.1 * step))
        return out

    with bare(method, net) as patch:
        together = trajectory(["cond", "uncond"], 1)
        alone = {b: trajectory([b], 2 + i)[b] for i, b in enumerate(x)}
        assert patch.tally["reused"] > 0
    for b in x:
        for one, other in zip(together[b], alone[b], strict=True):
            assert torch.equal(one, other)


def test_bare_network_takes_methods_alone() -> None:
    net, x = Net(), torch.randn(2, 8)
    plain = net(x)
    with hasten.accelerate(net, recipe("runtime.bf16")):
        assert not torch.equal(net(x), plain)
    assert torch.equal(net(x), plain)
    with pytest.raises(hasten.recipe.RecipeError, match="methods alone"):
        hasten.accelerate(net, Recipe(solver="ddim", steps=4))


def test_a_method_that_fails_half_way_takes_back_what_it_did() -> None:
    class Half(Method):
        stage, writes = METHODS["runtime.bf16"].stage, frozenset()

        def apply(self, model: nn.Module) -> Any:
            from hasten.patch import Patch

            with Patch() as patch:
                patch.wrap(model, lambda forward, *a: forward(*a))
                raise Refused("no")

    net = Net()
    with pytest.raises(Refused):
        Half().apply(net)
    assert "forward" not in vars(net)
