"""Each grid is even in what it names, and a peer's where a peer has it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.grid import Grid, build
from hasten.grids.beta import distribution
from hasten.grids.ends import even, laid
from hasten.path import Path
from hasten.paths import discrete
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.paths.shifted import Shifted

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD = discrete.scaled_linear()
SMALLEST, LARGEST = 0.0291671582, 14.6146412293
"""sigma / alpha at Stable Diffusion's first and last step."""


def laid_on(path: Path, name: str, steps: int, **settings: object) -> Grid:
    return build(path, tree.function("grids", name), steps, **settings)


def ratios(grid: Grid) -> torch.Tensor:
    return torch.tensor([n.sigma / n.alpha for n in grid.nodes if n.alpha], dtype=torch.float64)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_noise_levels_are_diffusers(name: str) -> None:
    from diffusers import EulerDiscreteScheduler

    for steps in (2, 5, 10, 30):
        peer = EulerDiscreteScheduler(**BETAS, **{f"use_{name}_sigmas": True})
        peer.set_timesteps(steps)
        got = ratios(laid_on(SD, name, steps, smallest=SMALLEST))
        assert (got / peer.sigmas.double() - 1)[:-1].abs().max() < 2e-5
        assert got[-1] == 0 == peer.sigmas[-1]


def test_from_pure_noise_karras_starts_as_if_at_50() -> None:
    roots = ratios(laid_on(Flow(), "karras", 9, smallest=0.03))[:-1] ** (1 / 7)  # the end at t = 1 has none
    want = torch.linspace(50 ** (1 / 7), 0.03 ** (1 / 7), 9, dtype=torch.float64)
    assert (roots - want[1:]).abs().max() < 1e-9


def test_exponential_is_a_constant_ratio() -> None:
    for path in (Flow(), EDM(30.0), Preserving()):
        got = ratios(laid_on(path, "exponential", 9, smallest=0.03))[:-1].log()
        inner = got if isinstance(path, EDM) else got[-8:]
        assert inner.diff(n=2).abs().max() < 1e-9
        assert abs(got[-1].exp() - 0.03) < 1e-12
    # from pure noise the first level would be `largest`, and the end stands in its place
    got = ratios(laid_on(Flow(), "exponential", 9, smallest=0.03, largest=40.0))[:-1].log()
    assert abs(got[0] - math.log(40) + (math.log(40) - math.log(0.03)) / 8) < 1e-9


@pytest.mark.parametrize(
    ("a", "b", "law"),
    [
        (0.5, 0.5, lambda t: 2 / math.pi * torch.asin(torch.sqrt(t))),
        (1.0, 3.5, lambda t: 1 - (1 - t) ** 3.5),
        (0.1, 1.0, lambda t: t**0.1),
        (2.0, 5.0, lambda t: 1 - (1 - t) ** 6 - 6 * t * (1 - t) ** 5),
        (5.0, 2.0, lambda t: 6 * t**5 - 5 * t**6),
        (0.6, 0.6, lambda t: by_quadrature(t, 0.6)),
    ],
)
def test_beta_takes_the_quantiles_of_its_law(a: float, b: float, law: Callable[[Tensor], Tensor]) -> None:
    t = torch.linspace(0.001, 0.999, 333, dtype=torch.float64)
    assert (distribution(t, a, b) - law(t)).abs().max() < 1e-12
    for steps in (1, 2, 7, 20):
        times = torch.tensor(tree.function("grids", "beta")(Flow(), steps, a=a, b=b), dtype=torch.float64)
        assert (times[0], times[-1]) == (1, 0)
        assert (law(times[1:-1]) - torch.linspace(1, 0, steps + 1, dtype=torch.float64)[1:-1]).abs().sum() < 1e-9


def by_quadrature(t: Tensor, a: float) -> Tensor:
    """Of Beta(a, a), with t = sigmoid(u): the trapezoid's error vanishes faster than any power of its step."""
    u = torch.linspace(-80, 80, 4001, dtype=torch.float64)
    whole = torch.sigmoid(u).mul(torch.sigmoid(-u)).pow(a).sum() * 0.04
    part = torch.linspace(0, 80, 16001, dtype=torch.float64)  # behind each t; its end counts half, and is corrected
    v = torch.logit(t)[:, None] - part
    f = torch.sigmoid(v).mul(torch.sigmoid(-v)).pow(a)
    weights = torch.ones_like(part)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return (f * weights).sum(1) * 0.005 / 3 / whole


def test_uniform_is_the_beta_of_ones() -> None:
    got, want = (torch.tensor([n.t for n in laid_on(Flow(), *g).nodes]) for g in (("beta", 6), ("uniform", 6)))
    assert (torch.tensor(tree.function("grids", "beta")(Flow(), 6, a=1.0, b=1.0)) - want).abs().max() < 1e-6
    assert (got - want).abs().max() > 0.01


def test_beta_on_a_flow_is_diffusers_but_for_its_last_level() -> None:
    """diffusers has N levels at the shares 1 .. 0 of N - 1 parts, stretched onto its own [sigma_min, sigma_max], and 0
    after them. (Where sigma is not the time it also takes quantiles of sigma, not of the time as Lee et al. do.)"""
    pytest.importorskip("scipy", reason="diffusers needs it")
    from diffusers import FlowMatchEulerDiscreteScheduler

    peer = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    for steps in (4, 9):
        peer.set_timesteps(steps + 1)
        low, high = float(peer.sigmas[-2]), float(peer.sigmas[0])
        got = torch.tensor([n.t for n in laid_on(Flow(), "beta", steps).nodes])
        assert (low + got * (high - low) - peer.sigmas[:-1]).abs().max() < 1e-6


def test_quadratic_is_even_in_the_root() -> None:
    roots = torch.tensor([n.t for n in laid_on(Flow(), "quadratic", 11).nodes], dtype=torch.float64).sqrt()
    assert roots.diff(n=2).abs().max() < 1e-14


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_dynamic_shift_is_diffusers(tokens: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    peer = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (tokens - 256) / (4096 - 256) * 0.65
    peer.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=mu)  # as the Flux pipeline asks
    got = torch.tensor([n.t for n in laid_on(Flow(), "dynamic_shift", 8, tokens=tokens).nodes])
    assert (got - peer.sigmas).abs().max() < 1e-6


@pytest.mark.parametrize("base", [Flow(), Preserving()], ids=lambda p: type(p).__name__)
def test_even_times_of_a_shifted_path_are_shifted_times_of_its_base(base: Path) -> None:
    moved = laid_on(base, "shifted", 9, shift=3.0).nodes
    for a, b in zip(laid_on(Shifted(base, 3.0), "uniform", 9).nodes, moved, strict=True):
        assert abs(a.alpha - b.alpha) + abs(a.sigma - b.sigma) < 1e-13


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_knots_stand_where_they_are_said_to(before: bool, after: bool) -> None:
    """On a path that reaches from -inf to inf each end of it stands in a knot's place, or apart from it."""
    for steps in (2, 3, 8):
        times = laid(Flow(), steps, even, -2.0, 3.0, before=before, after=after)
        lams = -torch.logit(torch.tensor(times[1:-1], dtype=torch.float64))
        want = even(-2.0, 3.0, steps - 1 + (not before) + (not after))[int(not before) :][: steps - 1]
        assert (lams - want).abs().max() < 1e-12
        assert (times[0], times[-1], len(times)) == (1.0, 0.0, steps + 1)
