"""AsymRnR: attention on fewer queries, keys and values, against loops over every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_matching import slow
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.overrides import TorchFunctionMode
from watch import BY_NAME, EVERY, Seen, applied, holds_on, tallied

from families import Family
from hasten import moment
from hasten.anatomy import anatomy
from hasten.method import Refused
from hasten.moment import Moment
from hasten.places import generator
from hasten.tokens import asymmetric
from hasten.tokens.asymmetric import Asymmetric, Kept
from hasten.tokens.matching import Pairs, destinations

pytestmark = [pytest.mark.system("asymrnr"), pytest.mark.filterwarnings("ignore:In CPU autocast")]


@pytest.mark.parametrize("family", EVERY)
def test_exact_at_rates_of_0_and_with_nothing_to_drop_alike_twice_and_removed_bit_for_bit(family: Family) -> None:
    idle = {"window_t": 1, "window_y": 1, "window_x": 1}
    holds_on(family, "tokens.asymmetric", {"queries": 0.0, "keys": 0.0}, idle, {"queries": 0.5, "keys": 0.3})


WORDS = {"cogvideox": (7, 0), "hunyuan_video": (0, 7), "wan": (0, 0), "flux": (7, 0)}
"""Before and after the picture, in the attention of each."""

LATENTS = {
    "cogvideox": (1, 3, 4, 8, 12),
    "hunyuan_video": (1, 4, 3, 4, 5),
    "wan": (1, 16, 3, 8, 8),
    "flux": (1, 64, 16),
}
GRIDS = {"cogvideox": (3, 4, 6), "hunyuan_video": (3, 4, 5), "wan": (3, 4, 4), "flux": (1, 8, 8)}


class Loops(TorchFunctionMode):
    """Attention written out, matched anew at each call: one query after the other, by the keys that stay."""

    def __init__(self, method: Asymmetric, name: str) -> None:
        super().__init__()
        self.method, self.words, self.grid, self.index = method, WORDS[name], GRIDS[name], 0

    def stands(self, x: torch.Tensor, rate: float, index: int) -> list[dict[int, int]]:
        n = x.shape[2]
        m = self.method
        into = destinations(self.grid, (m.window_t, m.window_y, m.window_x), generator(m.seed, index))
        return slow(x.flatten(0, 1), into.tolist(), n - int(n * (1 - rate)), "euclidean")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not attend:
            return func(*args, **kwargs)
        q, k, v = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(("query", "key", "value")))
        if q.shape[2] != k.shape[2]:
            return func(*args, **kwargs)
        length, first, last = q.shape[2], self.words[0], q.shape[2] - self.words[1]
        here = slice(first, last)
        queries = self.stands(q[:, :, here], self.method.queries, 2 * self.index)
        keys = self.stands(v[:, :, here], self.method.keys, 2 * self.index + 1)
        seen = torch.ones(length, length, dtype=torch.bool) if (mask := kwargs.get("attn_mask")) is None else mask
        seen = seen.expand(*q.shape[:2], length, length).flatten(0, 1)
        rows = []
        for b, (q_LC, k_LC, v_LC) in enumerate(zip(*(x.flatten(0, 1) for x in (q, k, v)))):
            stay = [i for i in range(length) if not first <= i < last or keys[b][i - first] == i - first]
            row = []
            for i in range(length):
                of = i if not first <= i < last else first + queries[b][i - first]
                logits = (k_LC[stay] @ q_LC[of]) / q.shape[-1] ** 0.5
                row.append(logits.masked_fill(~seen[b, of, stay], -torch.inf).softmax(0) @ v_LC[stay])
            rows.append(torch.stack(row))
        return torch.stack(rows).unflatten(0, q.shape[:2])

    def follow(self, net: torch.nn.Module) -> list[Any]:
        """Notes which block runs."""
        blocks = [b.module for chain in anatomy(net).chains for b in chain]
        return [b.register_forward_pre_hook(lambda *_, i=i: setattr(self, "index", i)) for i, b in enumerate(blocks)]


@pytest.mark.parametrize(
    "rates", [{"queries": 0.6, "keys": 0.0}, {"queries": 0.0, "keys": 0.4}, {"queries": 0.8, "keys": 0.3}]
)
@pytest.mark.parametrize("name", list(WORDS))
def test_a_network_equals_attention_written_out_in_loops(name: str, rates: dict[str, float]) -> None:
    family = BY_NAME[name]
    pipe, method = family.build(), Asymmetric(**rates)
    velocity = family.network(pipe, family.inputs())
    x = torch.randn(LATENTS[name], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with Loops(method, name) as loops:
            hooks = loops.follow(pipe.transformer)
            want = velocity(x, 500.0)
        for hook in hooks:
            hook.remove()
        with method.apply(pipe.transformer):
            got = velocity(x, 500.0)
        plain = velocity(x, 500.0)
    assert (plain - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


def test_matching_anew_each_time_equals_no_cache() -> None:
    """reuse = 1 over a whole trajectory, against loops that keep nothing; reuse = 3 is another picture."""
    family = BY_NAME["cogvideox"]
    pipe, steps = family.build(), {"num_inference_steps": 4}
    settings = {"queries": 0.5, "keys": 0.3}
    found = {}
    for reuse in (1, 3):
        with applied(pipe, "tokens.asymmetric", reuse=reuse, **settings):
            found[reuse] = family.call(pipe, **steps)
    with (
        applied(pipe, "cache.interval", every=1),
        Loops(Asymmetric(**settings), "cogvideox") as loops,
    ):  # for its moments
        loops.grid = (2, 4, 4)
        hooks = loops.follow(pipe.transformer)
        want = family.call(pipe, **steps)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found[1], want, rtol=0, atol=1e-4)
    assert (found[3] - want).abs().max() > 1e-3


@pytest.mark.parametrize(("reuse", "matched"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (4, [0, 4]), (9, [0])])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_matching_runs_every_so_many_evaluations_of_each_branch(name, reuse, matched, monkeypatch) -> None:
    family = BY_NAME[name]
    pipe, steps = family.build(), []

    def counted(*args: Any) -> Pairs:
        steps.append(moment.now().step)
        return original(*args)

    original = asymmetric.match
    monkeypatch.setattr(asymmetric, "match", counted)
    with applied(pipe, "tokens.asymmetric", reuse=reuse):
        for _ in range(2):  # another picture begins anew
            steps.clear()
            family.call(pipe)
            blocks = 2 * family.calls
            assert sorted(steps) == sorted(matched * blocks * 2)  # queries and values


def test_what_is_kept_is_of_one_trajectory_one_branch_one_form_and_not_old() -> None:
    kept, x, made = Kept(), torch.zeros(2, 3, 4, 5), []

    def get(step: int, run: int = 1, branch: Any = "cond", x: torch.Tensor = x, which: int = 0) -> Pairs | None:
        def find() -> Pairs:
            made.append(Pairs(torch.zeros(1, 1), torch.zeros(1, 1)))
            return made[-1]

        with moment.at(Moment(step=step, steps=9, run=run, branch=branch)):
            return kept.get(which, 3, x, find)

    first = get(0)
    assert get(1) is first and get(2) is first
    other = get(2, branch="uncond")
    assert other is not first and get(2) is first
    second = get(3)
    assert second is not first and get(5) is second and get(3, branch="uncond") is other
    assert get(4, which=1) is not second and get(4) is second
    new = get(5, run=2)
    assert new is not second and get(6, run=2) is new
    assert get(7, run=2, x=x[:1]) is not new
    assert get(1, run=2) is not get(1, run=2)  # the same evaluation once more reads nothing


def test_the_first_step_reads_nothing_and_branches_never_mix() -> None:
    net = BY_NAME["wan"].build().transformer
    rng = torch.Generator().manual_seed(0)
    xs = {b: torch.randn(1, 16, 3, 8, 8, generator=rng) for b in ("cond", "uncond")}
    text, t = torch.randn(1, 7, 16, generator=rng), torch.tensor([500.0])

    def trajectory(branches: list[str], run: int) -> dict[str, list[torch.Tensor]]:
        out: dict[str, list[torch.Tensor]] = {b: [] for b in branches}
        for step in range(4):
            for b in branches:
                with moment.at(Moment(step, 4, run=run, branch=b)), torch.no_grad():  # type: ignore[arg-type]
                    out[b].append(net(xs[b] + 0.3 * step, t, text).sample)
        return out

    with Asymmetric(reuse=3).apply(net):
        together = trajectory(["cond", "uncond"], 1)
        for b in xs:
            assert all(torch.equal(x, y) for x, y in zip(together[b], trajectory([b], 2)[b], strict=True))


def test_rows_that_attend_one_after_the_other_keep_their_own_matches() -> None:
    """Mochi attends row by row: two rows together give what each gives alone."""
    net = BY_NAME["mochi"].build().transformer
    rng = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 12, 2, 6, 6, generator=rng), torch.randn(2, 7, 16, generator=rng)

    def second(rows: slice, run: int) -> torch.Tensor:
        for step in range(2):
            with moment.at(Moment(step, 2, run=run)), torch.no_grad():
                size = len(x[rows])
                y = (1 - 0.5 * step) * x[rows]
                out = net(y, text[rows], torch.full((size,), 500.0), torch.ones(size, 7, dtype=torch.bool)).sample
        return out

    with Asymmetric(reuse=2).apply(net):
        together = second(slice(2), 1)
        alone = torch.cat([second(slice(1), 2), second(slice(1, 2), 3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rates", [(0.5, 0.3), (0.9, 0.9), (0.01, 0.0)])
@pytest.mark.parametrize("latents", [(3, 10, 14), (1, 2, 6), (5, 4, 2), (2, 2, 2)])
def test_odd_videos_lose_the_share_asked_for_and_never_a_destination(latents, rates) -> None:
    net = BY_NAME["wan"].build().transformer
    frames, rows, columns = latents[0], latents[1] // 2, latents[2] // 2
    n = frames * rows * columns
    kept = max(frames // 2, 1) * max(rows // 2, 1) * max(columns // 2, 1)
    x = torch.randn(1, 16, *latents, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Asymmetric(queries=rates[0], keys=rates[1]).apply(net), Seen() as seen:
        net(x, torch.tensor([500.0]), torch.zeros(1, 11, 16))
    q, k = (max(kept, int(n * (1 - r))) if r > 0 else n for r in rates)
    assert [pair for pair in seen.lengths if pair[1] != 11] == [(q, k)] * 2


def test_each_rate_adds_to_the_error() -> None:
    """On a video whose frames are alike, as frames are: mean over four of them."""
    family = BY_NAME["cogvideox"]
    pipe = family.build()
    velocity = family.network(pipe, family.inputs())

    def error(**rates: float) -> float:
        total = 0.0
        for seed in range(4):
            rng = torch.Generator().manual_seed(seed)
            x = torch.randn(1, 1, 4, 8, 8, generator=rng) + 0.3 * torch.randn(1, 4, 4, 8, 8, generator=rng)
            with torch.no_grad():
                plain = velocity(x, 500.0)
                with Asymmetric(**rates).apply(pipe.transformer):
                    total += float((velocity(x, 500.0) - plain).norm() / plain.norm())
        return total / 4

    for name, other in (("queries", "keys"), ("keys", "queries")):
        errors = [error(**{name: rate, other: 0.0}) for rate in (0.1, 0.3, 0.5, 0.8)]
        assert errors == sorted(errors) and errors[0] > 0, (name, errors)


def test_a_rate_holds_where_redundancy_was_measured() -> None:
    x = torch.randn(1, 2, 32, 4, generator=torch.Generator().manual_seed(0))
    alike = x[:, :, :1] + 0.1 * x

    def matched(least: float, x: torch.Tensor) -> Pairs | None:
        return Asymmetric(least=least)._match(x, 0.5, (2, 4, 4), 0, "queries")

    assert matched(0.0, x) is not None and matched(0.9, x) is None
    assert matched(0.9, alike) is not None and matched(1.0, alike) is None
    family = BY_NAME["cogvideox"]
    pipe, steps = family.build(), {"num_inference_steps": 2}
    before = family.call(pipe, **steps)
    with applied(pipe, "tokens.asymmetric", least=1.0) as handle:
        assert torch.equal(family.call(pipe, **steps), before)
        assert not tallied(handle)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(Refused, match=r"take tokens\.merge"):
        Asymmetric().apply(BY_NAME["sd"].build().unet)
    with pytest.raises(Refused, match="words from places"):
        Asymmetric().apply(BY_NAME["lumina2"].build().transformer)
    net = BY_NAME["cogvideox"].build().transformer
    x, text = torch.randn(1, 1, 4, 2, 14), torch.randn(1, 7, 16)
    with Asymmetric().apply(net), pytest.raises(Refused, match="as many words"):
        net(x, text, torch.tensor([500]))
