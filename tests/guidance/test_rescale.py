"""Rescaled guidance: the formula, in whatever the network says."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from hasten.denoiser import Prediction, Target, said
from hasten.grid import at
from hasten.guidance.rescale import rescale
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture

COND, UNCOND = Mixture(means=(0.5, 1.5), weights=(0.6, 0.4)).denoise, Mixture().denoise
NODES = at(Preserving(), [1.0, 0.8, 0.5, 0.1]).nodes


def state() -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_it_is_the_papers_formula_on_what_the_network_says(phi: float, target: Target) -> None:
    for node in NODES:
        c, u = said(target, COND(state(), node), node), said(target, UNCOND(state(), node), node)
        g = u + 6.0 * (c - u)
        got = said(target, rescale(COND, UNCOND, scale=6.0, phi=phi, target=target)(state(), node), node)
        assert torch.allclose(got, rescale_noise_cfg(g, c, phi), rtol=1e-8, atol=1e-9)
        if phi == 1:
            assert torch.allclose(got.std((1, 2)), c.std((1, 2)), rtol=1e-8)
        assert (got - g).abs().max() > 1e-5  # least for eps where all is noise


@pytest.mark.parametrize("target", get_args(Target))
def test_what_a_network_says_is_read_back_as_it_was(target: Target) -> None:
    """`said` is the inverse of reading, for every target."""
    for node in NODES:
        p = COND(state(), node)
        read = Prediction.of(target, said(target, p, node), p.x, node)
        assert torch.allclose(read.x0, p.x0, rtol=1e-8, atol=1e-9)
        assert torch.allclose(said(target, read, node), said(target, p, node), rtol=1e-8, atol=1e-9)
