"""Important tokens: who is chosen, against slow sums; what runs, against forwards written out; its ends, against other
caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from caches import ALL, built, comes_clean, neutral, on
from digits_dit import trained
from hasten import moment
from hasten.cache.token import Token, influence, spread, weight
from hasten.method import Refused
from hasten.moment import Moment
from hasten.picture import Call

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def a_call(tokens: int, words: int = 3, heads: int = 2, mask: Tensor | None = None) -> Call:
    g = torch.Generator().manual_seed(tokens)
    q, k, v = (torch.randn(2, heads, tokens + words, 8, generator=g) for _ in range(3))
    return Call(q, k, v, slice(words, words + tokens), mask)


@pytest.mark.parametrize("masked", [None, bool, float])
def test_influence_is_the_sum_over_columns_of_the_attention_map(masked: type | None) -> None:
    mask = None
    if masked is not None:
        hidden = torch.rand(2, 1, 1, 19, generator=torch.Generator().manual_seed(0)) < 0.3
        mask = ~hidden if masked is bool else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    call = a_call(16, mask=mask)
    # with unit vectors for values, attention gives its map
    unit = torch.eye(19).expand(2, 2, 19, 19)
    maps = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, unit, mask)
    assert torch.allclose(influence(call), maps.sum(2).mean(1)[:, 3:], atol=1e-5)


def test_influence_of_many_queries_is_told_from_an_even_choice() -> None:
    call = a_call(2045)
    maps = torch.softmax(call.query @ call.key.transpose(-1, -2) * 8**-0.5, -1)
    got = influence(call)
    assert torch.allclose(got, maps[:, :, ::4].sum(2).mean(1)[:, 3:] * 4, rtol=1e-4)
    whole = maps.sum(2).mean(1)[:, 3:]
    assert float(torch.corrcoef(torch.stack([got[0], whole[0]]))[0, 1]) > 0.9
    assert torch.allclose(weight(call), call.value.norm(dim=-1).mean(1)[:, 3:])


@pytest.mark.parametrize("grid", [(1, 4, 6), (2, 4, 4), (1, 5, 7), (1, 1, 9)])
def test_the_best_of_each_four_places_is_raised(grid: tuple[int, int, int]) -> None:
    frames, rows, columns = grid
    score = torch.rand(2, frames * rows * columns, generator=torch.Generator().manual_seed(0))
    want = score.clone().view(2, *grid)
    for b, f, y, x in ((b, f, y, x) for b in range(2) for f in range(frames) for y in range(0, rows - 1, 2)
                       for x in range(0, columns - 1, 2)):  # fmt: skip
        tile = want[b, f, y : y + 2, x : x + 2]
        i = int(tile.flatten().argmax())
        tile[i // 2, i % 2] *= 1.6
    assert torch.allclose(spread(score, grid, 0.6), want.view_as(score))
    assert torch.equal(spread(score, grid, 0.0), score)


class Plain(nn.Module):
    """A block whose parts a test can read: attention that mixes, a feed-forward token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Mean()
        self.ff = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.attn(hidden_states)
        return x + self.ff(x)


class Mean(nn.Module):
    """Attention of two heads without weights of its own."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        return out.transpose(1, 2).flatten(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Plain() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@contextmanager
def seen(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of what really ran of a module."""
    inner, calls = module.forward, []

    def note(x: Tensor) -> Tensor:
        out = inner(x)
        calls.append((x, out))
        return out

    module.forward = note
    yield calls
    del module.forward


def states(steps: int, tokens: int = 10) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, tokens, 8, generator=g) for _ in range(steps)]


def drive(net: nn.Module, xs: list[Tensor], run: int = 1) -> list[Tensor]:
    out = []
    for step, x in enumerate(xs):
        with torch.no_grad(), moment.at(Moment(step, len(xs), run=run)):
            out.append(net(x))
    return out


@pytest.mark.parametrize("score", ["attention", "values", "random"])
def test_between_key_steps_so_many_tokens_run_and_the_others_are_what_they_were_last(score: str) -> None:
    """Read at the last block's feed-forward: what ran, what came out."""
    net, xs = Net(), states(4)
    ff = net.blocks[1].ff
    with seen(ff) as ran, Token(every=4, keep=0.3, score=score).apply(net):  # type: ignore[arg-type]
        outs: list[tuple[Tensor, Tensor]] = []
        ff.register_forward_hook(lambda m, a, out: outs.append((a[0], out.clone())))
        drive(net, xs)
    assert [x.shape[1] for x, _ in ran] == [10, 3, 3, 3]
    last = outs[0][1]
    for given, got in outs[1:]:
        fresh = ff[1](ff[0](given)).detach()
        new = torch.isclose(got, fresh, atol=1e-6).all(-1)
        assert new.sum(1).tolist() == [3, 3]
        assert torch.equal(got[~new], last[~new])
        last = got


def test_attention_that_cannot_be_read_is_said() -> None:
    net = Net()
    for block in net.blocks:
        block.attn.forward = lambda x: x
    for score in ("attention", "values"):
        with Token(every=2, score=score).apply(net), pytest.raises(Refused, match="score: random"):  # type: ignore[arg-type]
            drive(net, states(2))
    with Token(every=2, score="random").apply(net):
        drive(net, states(2))


@pytest.mark.parametrize(("stale", "union"), [(10.0, 9), (0.0, 3)])
def test_who_waits_long_enough_runs(stale: float, union: int) -> None:
    """With enough weight on age, three steps of a third each reach every token; without, the same ones run again."""
    net = Net()
    x = states(1, 9)[0]
    with Token(every=10, keep=1 / 3, stale=stale, spread=0.0, score="values").apply(net):
        outs: list[Tensor] = []
        net.blocks[0].ff.register_forward_hook(lambda m, a, out: outs.append(out.clone()))
        drive(net, [x * (1 + step) for step in range(4)])
    touched = sum((~torch.isclose(a, b).all(-1)).int() for a, b in pairwise(outs))
    assert (touched > 0).sum(1).tolist() == [union, union]


@pytest.mark.parametrize("name", ["pixart", "sd3", "sd", "cogvideox"])
def test_its_ends_are_caches_of_whole_features(name: str) -> None:
    """All tokens: attention alone is given again; none: feed-forwards too, where words have none of their own."""
    pipe, _ = built(name)
    with on(pipe, "cache.feature", every=3, keep=("attention",)):
        want = ALL[name].call(pipe)
    with on(pipe, "cache.token", every=3, keep=1.0):
        assert torch.equal(ALL[name].call(pipe), want)
    if name != "sd3":
        with on(pipe, "cache.feature", every=3, keep=("attention", "feed_forward")):
            want = ALL[name].call(pipe)
        with on(pipe, "cache.token", every=3, keep=0.0):
            assert torch.equal(ALL[name].call(pipe), want)


def test_every_step_a_key_step_is_the_baseline_in_every_family() -> None:
    served = neutral("cache.token")
    assert {"sd", "sdxl", "sd3", "pixart", "flux", "wan", "cogvideox", "hunyuan_video", "hunyuandit", "ltx"} <= served
    assert not {"ddpm", "sana"} & served


@pytest.mark.parametrize("name", ["sd", "pixart", "wan"])
def test_it_keeps_the_contract_of_a_cache(name: str) -> None:
    comes_clean("cache.token", name, every=3)


@pytest.mark.parametrize("score", ["attention", "values", "random"])
def test_tokens_that_run_bring_a_trained_network_nearer(score: str) -> None:
    """On digits that a transformer has learned: nearer to its own samples than with no token that runs, and the more
    tokens the nearer."""
    net, steps = trained(), 12
    noise = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def drawn(run: int) -> Tensor:
        x = noise
        for i in range(steps):
            t = 1 - i / steps
            with torch.no_grad(), moment.at(Moment(i, steps, t, run=run)):
                x = x - net(x, torch.full((len(x),), t)) / steps
        return x

    want, off = drawn(0), []
    for run, keep in enumerate((0.0, 0.3, 0.7), 1):
        with Token(every=3, keep=keep, score=score).apply(net.dit):  # type: ignore[arg-type]
            off.append(float((drawn(run) - want).square().mean()))
    assert off[0] > off[1] > off[2] > 0
