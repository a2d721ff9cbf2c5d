"""ToDo: every query on fewer keys and values, against the same written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_merge import sample, two_resolutions
from watch import BY_NAME, EVERY, Seen, applied, holds_on, tallied

from families import Family, sd
from hasten.anatomy import anatomy
from hasten.method import Refused
from hasten.tokens.downsample import Downsample, nearest
from hasten.tokens.merge import Merge

pytestmark = [pytest.mark.system("todo"), pytest.mark.filterwarnings("ignore:In CPU autocast")]


@pytest.mark.parametrize("family", EVERY)
def test_exact_at_factor_1_alike_twice_and_removed_bit_for_bit(family: Family) -> None:
    idle = {"factor": 1, "second": 1 if family.name == "svd" else 2}  # but for it, all attend at one resolution
    holds_on(family, "tokens.downsample", {"factor": 1, "second": 1}, idle, {"factor": 2})


@pytest.mark.parametrize("grid", [(1, 8, 8), (1, 5, 7), (1, 11, 17), (1, 9, 2), (1, 1, 1), (3, 4, 6)])
@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_kept_places_are_those_of_nearest_neighbour_resizing(grid: tuple[int, int, int], factor: int) -> None:
    frames, rows, columns = grid
    places = torch.arange(frames * rows * columns, dtype=torch.float64).view(frames, 1, rows, columns)
    size = (max(1, rows // factor), max(1, columns // factor))
    want = F.interpolate(places, size=size, mode="nearest").flatten().long()
    assert torch.equal(nearest(grid, factor), want)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("name", ["sd", "pixart", "sd3", "flux", "qwen", "hunyuandit"])
def test_keys_are_fewer_by_the_factor_squared_and_queries_all_stay(name: str, factor: int) -> None:
    """64 places and, in joint attention, as many words as there are."""
    family = BY_NAME[name]
    pipe = family.build()
    steps = {"num_inference_steps": 2}
    with Seen() as before:
        family.call(pipe, **steps)
    with applied(pipe, "tokens.downsample", factor=factor) as handle, Seen() as after:
        family.call(pipe, **steps)
        dropped = tallied(handle)["keys dropped"]
    fewer = 64 - 64 // factor**2
    want = [(q, k - fewer) if q == k and q in (64, 71, 80) else (q, k) for q, k in before.lengths]
    assert after.lengths == want
    assert want != before.lengths
    assert dropped == fewer * sum(a != b for a, b in zip(want, before.lengths))


def written_out(attention: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Attention(Q, D(K), D(V)), sec. 3."""

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

    q, k, v = heads(attention.to_q(x)), heads(attention.to_k(x))[:, :, kept], heads(attention.to_v(x))[:, :, kept]
    y = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return attention.to_out[0](y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("factor", "second"), [(2, 1), (1, 2), (4, 2)])
def test_a_unet_equals_the_same_written_out(factor: int, second: int) -> None:
    unet, inputs = two_resolutions(), sample(8, 8)
    with torch.no_grad():
        plain = unet(*inputs).sample
        with Downsample(factor=factor, second=second).apply(unet):
            got = unet(*inputs).sample
        kept = {64: nearest((1, 8, 8), factor), 16: nearest((1, 4, 4), second)}
        for site in anatomy(unet).attentions("self"):
            module: Any = site.module
            module.forward = lambda x, module=module, **_: written_out(module, x, kept[x.shape[1]])
        want = unet(*inputs).sample
    assert (plain - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_turned_keys_are_dropped_where_positions_put_them() -> None:
    """In FLUX, hiding the other places of the picture from every query is the same: words before, all turned."""
    family = BY_NAME["flux"]
    pipe = family.build()
    velocity = family.network(pipe, family.inputs())
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    seen = torch.full((71,), -torch.inf)
    seen[:7] = 0
    seen[7 + nearest((1, 8, 8), 2)] = 0

    class Hidden(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            more = {"attn_mask": seen.expand(71, 71)} if func is F.scaled_dot_product_attention else {}
            return func(*args, **(kwargs or {}) | more)

    with torch.no_grad():
        with Hidden():
            want = velocity(x, 500.0)
        with Downsample(factor=2).apply(pipe.transformer):
            got = velocity(x, 500.0)
        assert (velocity(x, 500.0) - want).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "share"), [(32, 1.0), (64, 0.6)])
def test_at_as_many_attention_operations_its_error_is_below_that_of_merging(side: int, share: float) -> None:
    """Half of all tokens merged, and a quarter of the keys kept, cost the same. On smooth latents with some noise, as
    half denoised ones are: measured 0.4 to 0.9 of merging's error at 256 tokens, 0.3 to 0.5 at 1,024."""
    unet = sd().unet
    for seed in range(4):
        x, t, c = sample(side, side)
        coarse = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
        x = F.interpolate(coarse, size=(side, side), mode="bicubic") + 0.05 * x
        with torch.no_grad():
            plain, errors, costs = unet(x, t, c).sample, [], []
            for method in (Downsample(factor=2), Merge(ratio=0.5, seed=seed)):
                with method.apply(unet), Seen() as seen:
                    errors.append(float((unet(x, t, c).sample - plain).norm()))
                costs.append(sum(cost for cost, (_, k) in zip(seen.costs, seen.lengths) if k != 7))
            assert costs[0] == costs[1]
            assert errors[0] < share * errors[1]


@pytest.mark.parametrize(("rows", "columns"), [(10, 14), (18, 6), (11, 13)])
def test_odd_grids_are_served(rows: int, columns: int) -> None:
    unet, inputs = sd().unet, sample(rows, columns)
    with torch.no_grad(), Downsample(factor=2).apply(unet), Seen() as seen:
        unet(*inputs)
    side = -(-rows // 2), -(-columns // 2)
    tokens, kept = side[0] * side[1], (side[0] // 2) * (side[1] // 2)
    assert {(q, k) for q, k in seen.lengths if k != 7} == {(tokens, kept)}


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(Refused, match=r"take tokens\.asymmetric"):
        Downsample().apply(BY_NAME["cogvideox"].build().transformer)
    with pytest.raises(Refused, match="rows and columns"):
        Downsample().apply(BY_NAME["stable_audio"].build().transformer)
