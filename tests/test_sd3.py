"""What Stable Diffusion 3 brought: its shift, its times, and its transformer under every kind of method."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import hasten
from families import FAMILIES
from hasten import Recipe
from hasten.grids.shifted import shifted
from hasten.objectives.pretrain.flow_matching import logit_normal
from hasten.paths.flow import Flow

SD3 = FAMILIES[2]


@pytest.mark.system("sd3")
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shift_is_the_papers_and_diffusers(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    peer = FlowMatchEulerDiscreteScheduler(shift=shift)
    peer.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    assert torch.allclose(torch.tensor(shifted(Flow(), 7, shift=shift)), peer.sigmas, atol=1e-6)
    t = 0.3
    assert shifted(Flow(), 10, shift=shift)[7] == pytest.approx(shift * t / (1 + (shift - 1) * t))


def test_shifted_times_stay_within_the_path_whatever_the_shift() -> None:
    for i in range(1, 2000):
        times = shifted(Flow(), 7, shift=i / 100)
        assert times[0] == 1
        assert times[-1] == 0
        assert all(a > b for a, b in pairwise(times))


@pytest.mark.system("sd3")
@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (0.5, 0.6)])
def test_times_are_logit_normal(location: float, scale: float) -> None:
    """Counts in 20 bins against the density 1 / (s sqrt(2 pi)) 1 / (t (1 - t)) exp(-(logit t - m)^2 / (2 s^2))."""
    n = 200_000
    t = logit_normal(n, location, scale, torch.Generator().manual_seed(0))
    counts = torch.histc(t, 20, 0, 1) / n
    fine = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    density = torch.exp(-((fine.logit() - location) ** 2) / (2 * scale**2)) / (fine * (1 - fine))
    density = density / (scale * math.sqrt(2 * math.pi))
    expected = density.reshape(20, -1).mean(1) / 20
    assert float((counts - expected).abs().max()) < 5 * math.sqrt(0.1 * 0.9 / n)


@pytest.mark.system("sd3", "w8a8")
def test_all_kinds_of_method_compose_on_its_transformer() -> None:
    """Solver, grid, guidance interval, folded tokens, bf16, int8 and a cache at once: near the sample of
    the same solver without them, and the untouched bits after removal."""
    pipe = SD3.build()
    plain = SD3.call(pipe)
    grid = {"solver": "dpmpp_2m", "grid": "uniform", "steps": 12}
    inputs = {"num_inference_steps": 12}
    with hasten.accelerate(pipe, Recipe.from_dict(grid)):
        exact = SD3.call(pipe, **inputs)
    methods = [{"quant.w8a8": {"smallest": 8}}, "runtime.bf16", "tokens.fold", {"cache.interval": {"every": 2}}]
    recipe = Recipe.from_dict({**grid, "guidance": {"scale": 3.0, "interval": [0.1, 1.0]}, "methods": methods})
    try:
        handle = hasten.accelerate(pipe, recipe)
    except hasten.method.Refused as refused:
        pytest.skip(f"no int8 on this CPU: {refused}")
    got = SD3.call(pipe, **inputs)
    said = str(handle)
    handle.remove()
    assert torch.nn.functional.cosine_similarity(got.flatten(), exact.flatten(), 0) > 0.98
    assert "reused" in said
    assert "tokens folded" in said
    assert torch.equal(SD3.call(pipe), plain)
