"""ToMe for Stable Diffusion: exact where it merges nothing, and otherwise what the paper says, written out in loops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_matching import slow
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.overrides import TorchFunctionMode
from watch import BY_NAME, EVERY, Seen, applied, holds_on, tallied

from families import Family, _unet, sd
from hasten import moment
from hasten.anatomy import anatomy
from hasten.method import Refused
from hasten.moment import Moment
from hasten.places import generator
from hasten.tokens.matching import destinations
from hasten.tokens.merge import Merge

pytestmark = [pytest.mark.system("tome-sd"), pytest.mark.filterwarnings("ignore:In CPU autocast")]


@pytest.mark.parametrize("family", EVERY)
def test_exact_at_neutral_and_with_nothing_to_merge_alike_twice_and_removed_bit_for_bit(family: Family) -> None:
    holds_on(family, "tokens.merge", {"ratio": 0.0}, {"window_y": 1, "window_x": 1}, {"ratio": 0.5})


def matrices(x: torch.Tensor, into: list[int], r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merging [B, M, N] and copying back [B, N, M], from loops."""
    down, up = [], []
    for stands in slow(x, into, r, "cosine"):
        rows = sorted(set(stands.values()))
        back = torch.zeros(len(stands), len(rows))
        for i, j in stands.items():
            back[i, rows.index(j)] = 1
        up.append(back)
        down.append((back / back.sum(0)).T)
    return torch.stack(down), torch.stack(up)


@contextmanager
def by_loops(unet: torch.nn.Module, method: Merge, grid: tuple[int, int]) -> Iterator[None]:
    """Every transformer block of resolution `grid` written out: x + U attn(D norm(x)), and so on."""
    tokens = grid[0] * grid[1]
    blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    order = [b.module for chain in anatomy(unet).chains for b in chain]

    def forward(block: Any, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        down = up = torch.eye(x.shape[1])[None]
        if x.shape[1] == tokens:
            rng = generator(method.seed, order.index(block))
            into = destinations(grid, (method.window_y, method.window_x), rng)
            down, up = matrices(x, into.tolist(), int(tokens * method.ratio))
        on = (method.attention, method.cross_attention, method.feed_forward)
        parts = (block.attn1, lambda y: block.attn2(y, c), block.ff)
        for used, norm, part in zip(on, (block.norm1, block.norm2, block.norm3), parts):
            x = x + (up @ part(down @ norm(x)) if used else part(norm(x)))
        return x

    for block in blocks:
        block.forward = lambda x, encoder_hidden_states, block=block, **_: forward(block, x, encoder_hidden_states)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def sample(rows: int = 16, columns: int = 16, batch: int = 2) -> tuple[torch.Tensor, int, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(batch, 4, rows, columns, generator=rng), 300, torch.randn(batch, 7, 24, generator=rng)


SETTINGS = [
    {"ratio": 0.5},
    {"ratio": 0.2, "attention": False, "cross_attention": True},
    {"ratio": 0.7, "cross_attention": True, "feed_forward": True, "seed": 3},
    {"ratio": 0.9, "window_y": 2, "window_x": 3},
]


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (11, 18)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_unet_equals_the_paper_written_out_in_loops(settings: dict[str, Any], rows: int, columns: int) -> None:
    unet, inputs, method = sd().unet, sample(rows, columns), Merge(**settings)
    with torch.no_grad(), moment.at(Moment(step=4, steps=6)):
        with by_loops(unet, method, (-(-rows // 2), -(-columns // 2))):
            want = unet(*inputs).sample
        with method.apply(unet):
            got = unet(*inputs).sample
        plain = unet(*inputs).sample
    assert (plain - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def two_resolutions() -> torch.nn.Module:
    return _unet(
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize(("least", "merged"), [(1, {64}), (2, {64, 16})])
def test_only_the_finest_resolutions_are_merged(least: int, merged: set[int]) -> None:
    unet = two_resolutions()
    with torch.no_grad(), Merge(ratio=0.5, max_downsample=least).apply(unet), Seen() as seen:
        unet(*sample(8, 8))
    self_attention = {(q, k) for q, k in seen.lengths if k != 7}
    assert self_attention == {(n // 2, n // 2) if n in merged else (n, n) for n in (64, 16)}


def test_the_peers_own_package_gives_the_same_picture() -> None:
    """tomesd 0.1.3, handed the same random numbers. Runs where that package is installed."""
    tomesd = pytest.importorskip("tomesd")
    unet, inputs = sd().unet, sample()
    order = [b.name for chain in anatomy(unet).chains for b in chain]
    for ratio in (0.5, 0.75):
        with torch.no_grad():
            with Merge(ratio=ratio).apply(unet):
                got = unet(*inputs).sample
            tomesd.apply_patch(unet, ratio=ratio, max_downsample=2)
            names = [n for n, m in unet.named_modules() if type(m).__name__ == "ToMeBlock"]
            for name in names:
                info = dict(unet._tome_info, args=dict(unet._tome_info["args"]))
                info["args"]["generator"] = generator(0, order.index(name))
                unet.get_submodule(name)._tome_info = info
                unet.get_submodule(name).register_forward_pre_hook(lambda m, a: m._tome_info.update(size=(16, 16)))
            want = unet(*inputs).sample
            tomesd.remove_patch(unet)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


class Turned(TorchFunctionMode):
    """FLUX's attention written out: seven words before the picture; q, k and v of the picture merged by matrices."""

    def __init__(self, method: Merge, words: int, side: int) -> None:
        super().__init__()
        self.method, self.words, self.side = method, words, side
        self.x: torch.Tensor | None = None
        self.index = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not attend:
            return func(*args, **kwargs)
        into = destinations((self.side, self.side), (2, 2), generator(0, self.index))
        down, up = matrices(self.x, into.tolist(), int(self.side**2 * self.method.ratio))

        def by(matrix: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([y[:, :, : self.words], matrix[:, None] @ y[:, :, self.words :]], 2)

        q, k, v = (by(down, kwargs[n]) for n in ("query", "key", "value"))
        return by(up, (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v)


def test_flux_merges_what_its_positions_have_turned() -> None:
    pipe, method = BY_NAME["flux"].build(), Merge(ratio=0.5)
    net, inputs = pipe.transformer, BY_NAME["flux"].inputs()
    velocity = BY_NAME["flux"].network(pipe, inputs)
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    mode = Turned(method, 7, 8)
    blocks = [b for chain in anatomy(net).chains for b in chain]

    def noted(block: Any, index: int) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            mode.x, mode.index = block.inputs(args, kwargs).x, index

        return block.module.register_forward_pre_hook(before, with_kwargs=True)

    with torch.no_grad():
        hooks = [noted(b, i) for i, b in enumerate(blocks)]
        with mode:
            want = velocity(x, 500.0)
        for hook in hooks:
            hook.remove()
        with method.apply(net):
            got = velocity(x, 500.0)
        plain = velocity(x, 500.0)
    assert (plain - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_self_attention_costs_what_is_left_squared(name: str, ratio: float) -> None:
    family = BY_NAME[name]
    pipe = family.build()
    steps = {"num_inference_steps": 2}

    def costs() -> list[int]:
        with Seen() as seen:
            family.call(pipe, **steps)
        return [c for c, (_, keys) in zip(seen.costs, seen.lengths) if keys != 7]  # those are words

    before = costs()
    with applied(pipe, "tokens.merge", ratio=ratio) as handle:
        assert costs() == [c * (1 - ratio) ** 2 for c in before]
        assert tallied(handle)["tokens merged"] == 64 * ratio * len(before)


@pytest.mark.parametrize(("rows", "columns"), [(10, 14), (18, 6), (11, 13)])
def test_odd_grids_are_served_in_full(rows: int, columns: int) -> None:
    """Of 5 x 7, 9 x 3 and 6 x 7 tokens: int(ratio N) go while sources last."""
    unet, (x, t, c) = sd().unet, sample(rows, columns)
    side = -(-rows // 2), -(-columns // 2)
    tokens = side[0] * side[1]
    sources = tokens - (side[0] // 2) * (side[1] // 2)
    for ratio in (0.3, 0.9):
        with torch.no_grad(), Merge(ratio=ratio).apply(unet), Seen() as seen:
            unet(x, t, c)
        left = tokens - min(int(tokens * ratio), sources)
        assert {(q, k) for q, k in seen.lengths if k != 7} == {(left, left)}


def test_every_row_has_the_same_destinations_and_every_step_and_block_its_own() -> None:
    method, x = Merge(ratio=0.9), torch.randn(3, 64, 8, generator=torch.Generator().manual_seed(0))

    def found(step: int, index: int = 0, run: int = 0) -> list[list[int]]:
        with moment.at(Moment(step=step, steps=9, run=run)):
            return [sorted(row) for row in method.pairs(x, (1, 8, 8), index).stay_BM.tolist()]

    rows = found(0)
    assert rows[0] == rows[1] == rows[2]
    assert len({str(found(s, i)) for s in range(4) for i in range(4)}) == 16
    assert found(3, 2, run=1) == found(3, 2, run=7)
    corners = method.model_copy(update={"random": "never"})
    assert sorted(corners.pairs(x, (1, 8, 8), 0).stay_BM[0].tolist()) == [
        r * 8 + c for r in range(0, 8, 2) for c in range(0, 8, 2)
    ]
    even = method.model_copy(update={"random": "even"})
    assert torch.equal(even.pairs(x, (1, 8, 8), 0).stay_BM, corners.pairs(x, (1, 8, 8), 0).stay_BM)
    assert torch.equal(even.pairs(x[:2], (1, 8, 8), 0).stay_BM, method.pairs(x[:2], (1, 8, 8), 0).stay_BM)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(Refused, match=r"take tokens\.asymmetric"):
        Merge().apply(BY_NAME["wan"].build().transformer)
    with pytest.raises(Refused, match="no softmax"):
        Merge().apply(BY_NAME["sana"].build().transformer)
    pipe = BY_NAME["hunyuandit"].build()
    with applied(pipe, "tokens.merge", cross_attention=True), pytest.raises(Refused, match="cross_attention=false"):
        BY_NAME["hunyuandit"].call(pipe, num_inference_steps=1)
