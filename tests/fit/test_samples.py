"""Calibration samples: the network's own calls, at the times asked for, kept and read back to the bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as tree

from hasten import moment
from hasten.bridge.pipelines import networks
from hasten.fit.samples import read, samples, write
from hasten.method import Refused
from hasten.quant.times import even, normal
from pipelines import PIPELINES

NAMED = {f.name: f for f in PIPELINES}
CALLS = {"sd": 1, "sd3": 1, "pixart": 1, "flux": 2, "wan": 2}
"""Of the network an evaluation."""


def given(name: str) -> dict[str, Any]:
    return {k: v for k, v in NAMED[name].inputs().items() if k not in ("generator", "output_type")}


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out.sample


@pytest.mark.parametrize("name", CALLS)
def test_a_sample_called_again_says_what_the_network_said_then(name: str, tmp_path: Path) -> None:
    family = NAMED[name]
    pipe = family.build()
    before = family.call(pipe)
    (net,) = networks(pipe).values()
    said: list[tuple[int, str, Tensor]] = []

    def note(module: Any, args: Any, out: Any) -> None:
        here = moment.now()
        said.append((here.step, here.branch, first(out)))

    last = list(net.children())[-1]  # within the forward the moment is known; outputs are the network's own
    hook = net.register_forward_hook(note)
    inner: list[tuple[int, str]] = []
    within = last.register_forward_hook(lambda *_: inner.append((moment.now().step, moment.now().branch)))
    found = samples(pipe, ["", ""], even, 6, **given(name))
    hook.remove()
    within.remove()
    assert [(s.step, s.branch) for s in found] == [i for i in inner if i[0] in (0, 2, 4)]
    assert len(found) == 2 * 3 * CALLS[name]
    answers = [out for (step, _), (_, _, out) in zip(inner, said, strict=True) if step in (0, 2, 4)]
    with torch.no_grad():
        off = [float((first(s.call(net)) - a).abs().max()) for s, a in zip(found, answers, strict=True)]
    assert max(off) < 1e-6, off
    assert torch.equal(family.call(pipe), before)
    write(tmp_path / "kept.safetensors", found)
    again = read(tmp_path / "kept.safetensors")
    assert [(s.step, s.steps, s.t, s.branch) for s in again] == [(s.step, s.steps, s.t, s.branch) for s in found]
    for one, other in zip(found, again, strict=True):
        leaves = [tree.tree_leaves((s.args, s.kwargs)) for s in (one, other)]
        assert len(leaves[0]) == len(leaves[1])
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(*leaves, strict=True))


def test_the_moment_is_told_again() -> None:
    pipe = NAMED["flux"].build()
    (net,) = networks(pipe).values()
    found = samples(pipe, [""], even, 3, **given("flux"))
    seen: list[tuple[int, int, float, str]] = []

    def note(*_: Any) -> None:
        here = moment.now()
        seen.append((here.step, here.steps, here.t, here.branch))

    net.transformer_blocks[0].register_forward_hook(note)
    for s in found:
        with torch.no_grad():
            s.call(net)
    assert seen == [(s.step, s.steps, s.t, s.branch) for s in found]


def test_even_times_are_q_diffusions_and_normal_ones_ptq4dms() -> None:
    rng = torch.Generator().manual_seed(0)
    assert even(50, 25, rng) == list(range(0, 50, 2))
    assert Counter(even(10, 20, rng)) == dict.fromkeys(range(10), 2)
    drawn = normal(0.4, 0.4)(250, 40_000, rng)
    assert drawn == sorted(drawn)
    share = 1 - (torch.tensor(drawn) + 0.5) / 250  # from the clean end
    cut = torch.distributions.Normal(0.4, 0.4)
    for edge in (0.1, 0.4, 0.6, 0.9):
        assert float((share < edge).float().mean()) == pytest.approx(float(cut.cdf(torch.tensor(edge))), abs=0.01)
    assert float((share < 0.004).float().mean()) == pytest.approx(float(cut.cdf(torch.tensor(0.004))), abs=0.01)
    assert float((share > 0.996).float().mean()) == pytest.approx(1 - float(cut.cdf(torch.tensor(0.996))), abs=0.01)


def test_normal_times_are_paired_with_their_states() -> None:
    """A state is that of its step: the paper's algorithm, not the mirrored times of the released code."""
    pipe = NAMED["sd3"].build()
    found = samples(pipe, ["", "", ""], normal(0.2, 0.3), 12, **given("sd3"))
    assert len(found) == 12
    times = {s.step: s.t for s in found}
    assert all(times[a] > times[b] for a in times for b in times if a < b)
    for s in found:
        assert float(s.kwargs["timestep"].flatten()[0]) == pytest.approx(1000 * s.t, rel=1e-4)


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(Refused, match="has 2 networks"):
        samples(NAMED["wan22"].build(), [""], even, 4, **given("wan22"))
    with pytest.raises(ValueError, match="not 0 and 4"):
        samples(NAMED["sd"].build(), [], even, 4)
    with pytest.raises(ValueError, match="cannot be read"):
        read("nowhere.safetensors")
