"""Guidance as a denoiser that wraps denoisers, and its interval in a real pipeline."""

from __future__ import annotations

import pytest
import torch

import hasten
from families import FAMILIES, Family
from hasten import Recipe
from hasten.grid import at
from hasten.guidance.cfg import cfg
from hasten.paths.flow import Flow
from hasten.reference.laws import Gaussian

GRID = at(Flow(), [0.8, 0.5, 0.1])


@pytest.mark.system("cfg")
def test_guided_gaussians_are_guided_exactly() -> None:
    """Two Gaussians of one variance: guidance of scale w is the denoiser of the Gaussian whose mean is u + w (c -
    u)."""
    c, u = Gaussian(1.0, 0.3), Gaussian(-0.5, 0.3)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    for scale in (0.0, 0.5, 1.0, 3.0):
        want = Gaussian(-0.5 + scale * 1.5, 0.3)
        for node in GRID.nodes:
            got = cfg(c.denoise, u.denoise, scale=scale)(x, node)
            assert torch.allclose(got.x0, want.denoise(x, node).x0, atol=1e-12)
            assert torch.allclose(node.alpha * got.x0 + node.sigma * got.eps, x, atol=1e-12)


@pytest.mark.system("cfg")
def test_scale_1_and_times_outside_ask_one_branch_only() -> None:
    asked: list[str] = []

    def branch(name: str):  # type: ignore[no-untyped-def]
        def ask(x: torch.Tensor, n: object):  # type: ignore[no-untyped-def]
            asked.append(name)
            return Gaussian().denoise(x, n)  # type: ignore[arg-type]

        return ask

    x = torch.zeros(1)
    cfg(branch("c"), branch("u"), scale=1.0)(x, GRID.nodes[0])
    assert asked == ["c"]
    guided = cfg(branch("c"), branch("u"), scale=4.0, interval=(0.3, 0.6))
    for node in GRID.nodes:
        guided(x, node)
    assert asked == ["c", "c", "c", "u", "c"]


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in FAMILIES])
def test_an_empty_interval_is_the_conditional_branch_alone(family: Family) -> None:
    """Guided nowhere, u + s (c - u) is c: the same sample as with guidance off, at half the network's work."""
    pipe = family.build()
    off = {"true_cfg_scale": 1.0} if family.name == "flux" else {"guidance_scale": 1.0}
    alone = family.call(pipe, **off)
    sizes: list[int] = []
    net = getattr(pipe, "unet", None) or pipe.transformer
    recipe = Recipe.from_dict({"guidance": {"interval": [1.0, 1.0]}})
    with hasten.accelerate(pipe, Recipe.from_dict({"methods": [{"guidance.interval": {"low": 0.0, "high": 0.0}}]})):
        count = net.register_forward_hook(lambda *_: sizes.append(1))
        got = family.call(pipe)
        count.remove()
    assert (got - alone).abs().max() < 2e-4 * alone.abs().max().clamp_min(1)
    assert recipe.all_methods()[0].label() == "guidance.interval"
