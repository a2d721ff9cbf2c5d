"""Block caching: the schedule of a measured table, each block's own, and scales and shifts by least squares."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caches import ALL, built, on
from driven import AUTOCAST, Tiny, asked, behaves, drive, network, path, randn, same, serves
from families import _unet
from hasten import Recipe, moment
from hasten.anatomy import anatomy
from hasten.bridge.pipelines import networks
from hasten.cache.block import Block, fit, measure, schedule, table
from hasten.cache.shift import Shift, Sums
from hasten.method import Refused

pytestmark = pytest.mark.system("block-caching")
STEPS = 10
T, F = True, False


@pytest.mark.parametrize(
    ("changes", "delta", "spared"),
    [
        ((0.1, 0.1, 0.1, 0.1, 0.1), 0.25, (F, T, T, F, T, T)),
        ((0.1, 0.1, 0.1), 0.0, (F, F, F, F)),
        ((0.5, 0.1, 0.1, 0.9, 0.2), 0.3, (F, F, T, T, F, T)),
        ((0.25, 0.25, 0.25), 0.5, (F, T, T, F)),  # at delta it is still within
        ((0.0, 0.0), 0.1, (F, T, T)),
        ((), 0.1, (F,)),
    ],
)
def test_the_schedule_is_what_a_hand_computes(
    changes: tuple[float, ...], delta: float, spared: tuple[bool, ...]
) -> None:
    assert schedule(changes, delta) == spared


@pytest.mark.parametrize("seed", range(10))
def test_the_schedule_is_the_papers_inequality(seed: int) -> None:
    """Eq. 7: a value of step a is kept to the last step b with sum_(a..b-1) <= delta, and the next is computed."""
    changes = tuple(torch.rand(19, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist())
    for delta in (0.3, 1.0, 2.5):
        runs = [s for s, spare in enumerate(schedule(changes, delta)) if not spare]
        assert runs[0] == 0
        for a, b in pairwise([*runs, 20]):
            assert sum(changes[a : b - 1]) <= delta + 1e-12
            assert b == 20 or sum(changes[a:b]) > delta - 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_skips_grow_with_delta(seed: int) -> None:
    changes = tuple(torch.rand(29, generator=torch.Generator().manual_seed(seed)).square().tolist())
    spared = [sum(schedule(changes, d / 20)) for d in range(60)]
    assert all(a <= b for a, b in pairwise(spared))
    assert spared[0] == 0 and spared[-1] > 20


def residuals(net: Tiny, branch: str = "both") -> list[list[Tensor]]:
    """What each block adds, by block and step, taken with hooks."""
    found: list[list[Tensor]] = [[] for _ in net.transformer_blocks]
    handles = [
        b.register_forward_hook(lambda m, args, out, i=i: found[i].append(out - args[0]))
        for i, b in enumerate(net.transformer_blocks)
    ]
    drive(asked(net), STEPS, branches=(branch,))
    for h in handles:
        h.remove()
    return found


def test_the_measured_table_is_the_change_of_each_blocks_residual() -> None:
    net = Tiny()
    plain = drive(asked(net), STEPS, branches=("cond", "uncond"))
    want = {}
    for i, pairs in enumerate(zip(residuals(net, "cond"), residuals(net, "uncond"), strict=True)):
        rows = [[float((b - a).abs().sum() / a.abs().sum()) for a, b in pairwise(rs)] for rs in pairs]
        want[f"transformer_blocks.{i}"] = [(c + u) / 2 for c, u in zip(*rows, strict=True)]
    patch, found = measure(net)
    said = drive(asked(net), STEPS, branches=("cond", "uncond"))
    drive(asked(net), 1, run=9)  # nothing to compare
    patch.remove()
    assert all(same(said[b], plain[b]) for b in said)  # untouched
    got = found.table()
    assert list(got) == list(want)
    for name, row in want.items():
        assert got[name] == pytest.approx(row, rel=1e-5)


def test_the_table_is_the_mean_over_runs_also_where_one_broke_off() -> None:
    runs = [{"a": {1: 0.2, 2: 0.4, 3: 0.6}}, {"a": {1: 0.4}, "b": {2: 1.0}}]
    assert table(runs) == {"a": pytest.approx((0.3, 0.4, 0.6)), "b": (0.0, 1.0)}
    assert table([]) == {}


TABLE = {"transformer_blocks.0": (0.1,), "transformer_blocks.1": (0.2,), "transformer_blocks.2": (0.6,)}


@torch.no_grad()
def slowly(delta: float, rows: dict[str, tuple[float, ...]]) -> tuple[list[Tensor], list[list[int]]]:
    """Block caching on Tiny, written out: outputs, and the steps at which each block ran."""
    net, out, kept, ran, total = Tiny(), [], {}, [[], [], []], [0.0] * 3
    for step in range(STEPS):
        x, emb = path(step), torch.tanh(net.time(torch.tensor([[1 - 0.03 * step]])))
        for i, block in enumerate(net.transformer_blocks):
            row = rows[f"transformer_blocks.{i}"]
            total[i] += row[0] if step else 0.0
            if step == 0 or total[i] > delta:
                kept[i], total[i] = block(x, emb) - x, 0.0
                ran[i].append(step)
            x = x + kept[i]
        out.append(x)
    return out, ran


@pytest.mark.parametrize("delta", [0.15, 0.35, 1.0])
def test_it_is_the_slow_reference_and_each_block_has_its_own_schedule(delta: float) -> None:
    want, ran = slowly(delta, TABLE)
    net = Tiny()
    seen: list[list[int]] = [[], [], []]
    for i, b in enumerate(net.transformer_blocks):
        b.attn1.register_forward_hook(lambda *_, i=i: seen[i].append(moment.now().step))
    with Block(delta=delta, table=TABLE).apply(net):
        said = drive(asked(net), STEPS)["both"]
    assert seen == ran
    assert len({len(r) for r in ran}) > 1
    for a, b in zip(said, want, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_skips_of_a_measured_network_grow_with_delta_and_none_are_at_zero() -> None:
    pipe, plain = built("sd")
    net = next(iter(networks(pipe).values()))
    patch, found = measure(net)
    with on(pipe, "cache.interval", every=1):
        assert torch.equal(ALL["sd"].call(pipe), plain)
    patch.remove()
    measured = found.table()
    assert set(measured) == {b.name for b in anatomy(net).blocks}
    spared = []
    for delta in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 3.0):
        rows = {n: list(r) for n, r in measured.items()}
        with on(pipe, "cache.block", delta=delta, table=rows) as handle:
            drawn = ALL["sd"].call(pipe)
            spared.append(handle.patches[0][1].tally["reused"])
            assert torch.equal(drawn, plain) == (spared[-1] == 0)
    assert spared[0] == 0 and all(a <= b for a, b in pairwise(spared))
    assert len(set(spared)) >= 4
    assert spared[-1] == 5 * len(measured)


def test_a_block_without_a_row_runs_always_and_a_strange_table_is_refused() -> None:
    net = Tiny()
    with Block(table={"transformer_blocks.1": (0.0,)}).apply(net) as patch:
        drive(asked(net), STEPS)
        assert patch.tally == {"ran": 2 * STEPS + 1, "reused": STEPS - 1}
    with pytest.raises(Refused, match=r"no block 'blocks.7'; .* measure this one"):
        Block(table={"blocks.7": (0.1,)}).apply(net)
    with pytest.raises(Refused, match="cannot be read"):
        Block(shifts="/nowhere.safetensors").apply(net)
    assert not any("forward" in vars(m) for m in net.modules())


def test_a_recipe_stores_the_table(tmp_path: Path) -> None:
    wanted = Recipe(methods=(Block(delta=0.3, table={"a.0": (0.1, 0.25), "*": (0.5,)}),))
    wanted.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == wanted


def test_the_affine_map_is_the_least_squares_of_each_channel() -> None:
    kept, other = randn(3, 7, 4).double(), randn(3, 7, 4, seed=1).double()
    true = kept * torch.tensor([2.0, -0.5, 1.0, 0.0]) + torch.tensor([0.1, 3.0, 0.0, -1.0]) + 0.2 * other
    sums = Sums()
    for k, t in zip(kept, true, strict=True):  # bit by bit
        sums.add(k[None], t[None])
    a, b = sums.solve().double()
    for c in range(4):
        columns = torch.stack([kept[..., c].flatten(), torch.ones(21, dtype=torch.float64)], 1)
        want = torch.linalg.lstsq(columns, true[..., c].flatten()[:, None]).solution[:, 0]
        assert torch.allclose(torch.stack([a[c], b[c]]), want, atol=1e-6)
    image, video = Sums(), Sums()
    image.add(kept.movedim(-1, 1).unsqueeze(-1), true.movedim(-1, 1).unsqueeze(-1))
    video.add(kept.movedim(-1, 1)[..., None, None], true.movedim(-1, 1)[..., None, None])
    assert torch.allclose(image.solve(), sums.solve()) and torch.allclose(video.solve(), sums.solve())


def test_it_is_the_identity_where_nothing_calls_for_more() -> None:
    x = randn(2, 5, 4)
    same_as_before = Sums()
    same_as_before.add(x, x)
    assert torch.allclose(same_as_before.solve(), torch.tensor([[1.0], [0.0]]).expand(2, 4), atol=1e-6)
    assert Sums().solve().tolist() == [[1.0], [0.0]]
    flat = Sums()
    flat.add(torch.full((2, 5, 4), 3.0), torch.full((2, 5, 4), 5.0))
    assert torch.equal(flat.solve(), torch.tensor([[1.0] * 4, [2.0] * 4]))
    one = Shift(STEPS, {("b", "x", 3): Sums().solve()})
    assert torch.equal(one.moved(x, ("b", "x", 3), STEPS), x)
    assert one.moved(x, ("b", "x", 4), STEPS) is x  # no place
    two = Shift(STEPS, {("b", "x", 3): torch.tensor([[2.0] * 4, [1.0] * 4])})
    assert torch.equal(two.moved(x, ("b", "x", 3), STEPS), 2 * x + 1)
    assert two.moved(x, ("b", "x", 3), STEPS + 1) is x  # another number of steps


def test_a_file_of_shifts_is_read_back_and_others_are_refused(tmp_path: Path) -> None:
    shift = Shift(7, {("a.0", "x", 3): randn(2, 4), ("a.0", "c", 5): randn(2, 4)})
    shift.write(tmp_path / "s.safetensors")
    back = Shift.read(tmp_path / "s.safetensors")
    assert back.steps == 7 and set(back.at) == set(shift.at)
    assert all(torch.equal(back.at[k], shift.at[k]) for k in shift.at)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read"):
        Shift.read(tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="holds no scales"):
        Shift.read(tmp_path / "y.safetensors")


def smooth(step: int, seed: int, *shape: int) -> Tensor:
    """A state that drifts, the same way for all seeds, from an end of its own."""
    return math.cos(0.1 * step) * randn(*shape, seed=seed) + math.sin(0.1 * step) * randn(*shape, seed=seed + 1)


def ask_unet(net: Any, seed: int) -> Any:
    return lambda s, _: net(smooth(s, seed, 2, 4, 16, 16), 900.0 - 60 * s, randn(2, 7, 24, seed=seed)).sample


def ask_sd3(net: Any, seed: int) -> Any:
    def ask(s: int, _: str) -> Tensor:
        text, pooled = randn(2, 7, 16, seed=seed), randn(2, 16, seed=seed)
        return net(smooth(s, seed, 2, 4, 16, 16), text, pooled, torch.full((2,), 900.0 - 60 * s)).sample

    return ask


@pytest.mark.parametrize("kind", ["unet", "dit", "tiny"])
def test_scale_and_shift_lower_the_outputs_error_also_on_states_never_seen(kind: str, tmp_path: Path) -> None:
    build, ask = {
        "unet": (_unet, ask_unet), "dit": (lambda: network("sd3"), ask_sd3),
        "tiny": (Tiny, lambda net, seed: lambda s, _: net(path(s, batch=8, seed=seed), 1 - 0.08 * s)),
    }[kind]  # fmt: skip
    net: Any = build()
    bare = Block(delta=0.35, table={"*": (0.1,)})

    def mse(method: Block, seed: int) -> float:
        true = drive(ask(net, seed), STEPS)["both"]
        with method.apply(net) as patch:
            said = drive(ask(net, seed), STEPS)["both"]
            assert patch.tally["reused"] > patch.tally["ran"]
        return sum(float((a - b).square().mean()) for a, b in zip(said, true, strict=True))

    with bare.apply(net):
        student = drive(ask(net, 100), STEPS)["both"]
    patch, fitting = fit(net, bare)
    assert same(drive(ask(net, 100), STEPS)["both"], student)  # as with the method while it is fitted
    for run in range(2, 5):
        drive(ask(net, 100 * run), STEPS, run=run)
    patch.remove()
    fitting.shift().write(tmp_path / "s.safetensors")
    moved = bare.model_copy(update={"shifts": str(tmp_path / "s.safetensors")})
    seen, unseen = ((mse(moved, s) / mse(bare, s)) for s in (100, 7000))
    assert seen < 0.95
    assert unseen < 1.0


def test_fitted_places_are_those_that_the_schedule_spares() -> None:
    net = network("sd3")
    method = Block(delta=0.25, table={"transformer_blocks.0": (0.1,), "transformer_blocks.1": (0.2,)})
    patch, fitting = fit(net, method)
    drive(ask_sd3(net, 1), 6)
    patch.remove()
    spared = {("0", s) for s in (1, 2, 4, 5)} | {("1", s) for s in (1, 3, 5)}
    assert set(fitting.at) == {(f"transformer_blocks.{b}", stream, s) for b, s in spared for stream in ("x", "c")}
    assert fitting.steps == 6


def test_the_pairs_are_the_kept_residual_and_that_of_the_whole_network_on_the_same_state() -> None:
    """On Tiny, by hand: at step 2 what was added at step 0 stands for what is added at step 2. At step 3 all run."""
    net = Tiny()
    rs = residuals(net)
    patch, fitting = fit(net, Block(delta=0.25, table={"*": (0.1,)}))
    drive(asked(net), STEPS)
    patch.remove()
    for i in range(3):
        for step, of in ((2, 0), (5, 3)):
            want = Sums()
            want.add(rs[i][of], rs[i][step])
            assert torch.allclose(fitting.at[f"transformer_blocks.{i}", "x", step].solve(), want.solve(), atol=1e-6)


def test_it_keeps_the_contract_of_a_cache(tmp_path: Path) -> None:
    behaves(Block(delta=0.25))
    behaves(Block(delta=0.35, table=TABLE))
    Shift(8, {(f"transformer_blocks.{i}", "x", s): torch.tensor([[1.1] * 8, [0.1] * 8]) for i in range(3) for s in
              range(8)}).write(tmp_path / "s.safetensors")  # fmt: skip
    behaves(Block(delta=0.25, shifts=str(tmp_path / "s.safetensors")))


@AUTOCAST
@pytest.mark.parametrize("name", ALL)
def test_every_family(name: str) -> None:
    serves(Block(), Block(delta=0.0), name)
