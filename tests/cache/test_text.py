"""Text read once: every bit as before, in every family, and the words' modules run once a picture and branch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from caches import ALL, TEXT, Broken, breaking, built, driven, neutral, on, prompted
from families import _unet
from hasten import moment
from hasten.bridge.pipelines import networks
from hasten.cache.text import Text, reads_words
from hasten.moment import Moment
from hasten.patch import Patch

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def test_every_family_that_reads_words_draws_the_same_bits() -> None:
    served = neutral("cache.text")
    assert {"sd", "sdxl", "pixart", "sana", "wan", "ltx", "hunyuandit", "flux", "sd3"} <= served


@pytest.mark.parametrize("name", sorted({"sd", "sdxl", "pixart", "wan", "hunyuandit", "sana", "ltx"} & set(ALL)))
def test_what_reads_words_runs_once_a_picture_and_branch(name: str) -> None:
    pipe, before = built(name)
    seen: list[Moment] = []

    def told(forward: Any, *args: Any) -> Any:
        seen.append(moment.now())
        return forward(*args)

    with Patch() as within:
        readers = [r for network in networks(pipe).values() for r in dict.fromkeys(reads_words(network))]
        for reader in readers:
            within.wrap(reader, told)
        with on(pipe, "cache.text"):
            for _ in range(2):  # the second picture begins anew
                seen.clear()
                assert torch.equal(ALL[name].call(pipe), before)
                assert len(seen) == len(readers) * len({m.branch for m in seen})
                assert all(m.step == 0 for m in seen)


def test_other_words_on_the_way_are_read() -> None:
    """A callback that changes the words of a running picture is heard, with the same bits as without the cache; so is
    one that writes into them."""
    pipe, _ = built("sd")

    def other(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": given["prompt_embeds"].flip(1)} if step == 2 else {}

    def written(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            given["prompt_embeds"][:, 0] = 0.5
        return {}

    for change in (other, written):
        asked = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        want = ALL["sd"].call(pipe, **asked)
        with on(pipe, "cache.text"):
            assert torch.equal(ALL["sd"].call(pipe, **asked), want)
        assert not torch.equal(want, ALL["sd"].call(pipe))


def test_a_number_that_differs_runs_it_again_whoever_wrote_it() -> None:
    """Copies are known by their numbers; what was written into a tensor in between is seen, of tensors of inference
    mode too, whose writes are not counted."""
    net = _unet()
    with Text().apply(net) as patch, torch.inference_mode():
        words = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(0))
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

        def at(step: int) -> tuple[Any, int]:
            ran = patch.tally["ran"]
            with moment.at(Moment(step, 9, branch="cond", run=1)):
                return net(x, 100.0, words).sample, patch.tally["ran"] - ran

        first, every = at(0)
        again, none = at(1)
        words = words.clone()
        copied, zero = at(2)
        assert torch.equal(first, again) and torch.equal(first, copied) and every > 0 and none == zero == 0
        words[0, 3, 5] += 1e-3
        moved, some = at(3)
        assert some == every and not torch.equal(moved, first)


def test_branches_and_trajectories_stay_apart() -> None:
    net = _unet()
    calls = {b: prompted(b) for b in ("cond", "uncond")}
    want = driven(net, calls, 4, 1)
    with Text().apply(net) as patch:
        readers = len(set(reads_words(net)))
        for run in (1, 2):
            got = driven(net, calls, 4, run)
            assert all(torch.equal(a, b) for k in want for a, b in zip(want[k], got[k], strict=True))
            assert patch.tally["ran"] == 2 * run * readers
    assert not any("forward" in vars(m) for m in net.modules())


def test_a_picture_that_breaks_off_leaves_nothing() -> None:
    pipe, before = built("pixart")
    with on(pipe, "cache.text"):
        with breaking(pipe.transformer.transformer_blocks[0].attn2.to_k, 1), pytest.raises(Broken):
            ALL["pixart"].call(pipe)
        assert torch.equal(ALL["pixart"].call(pipe), before)


def test_gradients_reach_the_keys_at_every_step() -> None:
    net = _unet()
    reader = next(reads_words(net))
    with Text().apply(net), torch.enable_grad():
        for step in range(2):
            x = torch.zeros(1, 4, 16, 16)
            with moment.at(Moment(step, 2, branch="cond", run=1)):
                net(x, 100.0, TEXT["cond"]).sample.sum().backward()
            grad = reader.weight.grad
            assert grad is not None and float(grad.abs().sum()) > 0
            net.zero_grad()
