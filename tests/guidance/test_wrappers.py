"""What holds for every guidance: neutral settings are exact, calls are as said, and x0 and eps stay one state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.denoiser import Denoiser, Prediction
from hasten.grid import at
from hasten.guidance.apg import apg
from hasten.guidance.autoguidance import autoguidance
from hasten.guidance.cfg import cfg
from hasten.guidance.cfg_pp import cfg_pp
from hasten.guidance.classifier import classifier
from hasten.guidance.energy import energy
from hasten.guidance.perturbed import perturbed
from hasten.guidance.rescale import rescale
from hasten.guidance.zero_star import zero_star
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import Counted

PATHS = [Flow(), EDM(), Preserving()]
TIMES = [1.0, 0.8, 0.5, 0.1]
LABELS = torch.zeros(3, dtype=torch.long)


def logits(x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([x.sum(-1), -x.sum(-1)], -1) * (1 - t[:, None])


def squared(x: Tensor, node: Any) -> Tensor:
    return -(x**2).sum(-1)


# guidance -> (how it is made, calls of c and of u over the four times)
CASES: dict[str, tuple[Callable[[Denoiser, Denoiser], Denoiser], tuple[int, int]]] = {
    "cfg": (lambda c, u: cfg(c, u, scale=3.0), (4, 4)),
    "cfg at scale 1": (lambda c, u: cfg(c, u, scale=1.0), (4, 0)),
    "cfg at scale 0": (lambda c, u: cfg(c, u, scale=0.0), (0, 4)),
    "cfg in an interval": (lambda c, u: cfg(c, u, interval=(0.2, 0.6)), (4, 1)),
    "rescale": (lambda c, u: rescale(c, u), (4, 4)),
    "rescale at scale 1": (lambda c, u: rescale(c, u, scale=1.0), (4, 0)),
    "apg": (lambda c, u: apg(c, u, radius=1.0), (4, 4)),
    "apg at scale 1": (lambda c, u: apg(c, u, scale=1.0), (4, 0)),
    "zero_star": (lambda c, u: zero_star(c, u, zeros=1), (3, 3)),
    "zero_star of two zeros": (lambda c, u: zero_star(c, u, zeros=2), (2, 2)),
    "zero_star at scale 1": (lambda c, u: zero_star(c, u, scale=1.0, zeros=0), (4, 0)),
    "cfg_pp": (lambda c, u: cfg_pp(c, u), (4, 4)),
    "cfg_pp at scale 0": (lambda c, u: cfg_pp(c, u, scale=0.0), (0, 4)),
    "autoguidance": (lambda c, u: autoguidance(c, u), (4, 4)),
    "autoguidance at scale 1": (lambda c, u: autoguidance(c, u, scale=1.0), (4, 0)),
    "perturbed": (lambda c, u: perturbed(c, u), (4, 4)),
    "perturbed at scale 0": (lambda c, u: perturbed(c, u, scale=0.0), (4, 0)),
    "classifier": (lambda c, u: classifier(c, logits, LABELS), (4, 0)),
    "energy": (lambda c, u: energy(c, squared), (4, 0)),
    "energy of x0": (lambda c, u: energy(c, squared, of="x0"), (4, 0)),
}
NEUTRAL: dict[str, tuple[Callable[[Denoiser, Denoiser], Denoiser], Callable[[Denoiser, Denoiser], Denoiser]]] = {
    "cfg": (lambda c, u: cfg(c, u, scale=1.0), lambda c, u: c),
    "rescale": (lambda c, u: rescale(c, u, scale=3.0, phi=0.0), lambda c, u: cfg(c, u, scale=3.0)),
    "zero_star": (
        lambda c, u: zero_star(c, u, scale=3.0, zeros=0, optimise=False),
        lambda c, u: cfg(c, u, scale=3.0),
    ),
    "apg at scale 1": (lambda c, u: apg(c, u, scale=1.0), lambda c, u: c),
    "cfg_pp": (lambda c, u: cfg_pp(c, u, scale=0.0), lambda c, u: u),
    "autoguidance": (lambda c, u: autoguidance(c, u, scale=1.0), lambda c, u: c),
    "perturbed": (lambda c, u: perturbed(c, u, scale=0.0), lambda c, u: c),
    "classifier": (lambda c, u: classifier(c, logits, LABELS, scale=0.0), lambda c, u: c),
    "energy": (lambda c, u: energy(c, squared, scale=0.0), lambda c, u: c),
}


def laws() -> tuple[Denoiser, Denoiser]:
    return Mixture(means=(0.5, 1.5), weights=(0.6, 0.4)).denoise, Mixture().denoise


def state(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_guidance_is_here() -> None:
    assert {n.split()[0] for n in CASES} == set(tree.functions("guidance"))
    assert {n.split()[0] for n in NEUTRAL} >= set(tree.functions("guidance")) - {"apg"}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_as_its_docstring_says(name: str) -> None:
    make, calls = CASES[name]
    cond, uncond = (Counted(d) for d in laws())
    guided = make(cond, uncond)
    for node in at(Flow(), TIMES).nodes:
        guided(state(), node)
    assert (cond.calls, uncond.calls) == calls


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_exact(name: str, path: Any) -> None:
    got, want = (make(*laws()) for make in NEUTRAL[name])
    for node in at(path, TIMES[1:]).nodes:
        a, b = got(state(), node), want(state(), node)
        assert torch.equal(a.x0, b.x0) and torch.equal(a.eps, b.eps) and torch.equal(a.x, b.x)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_apg_at_neutral_settings_is_cfg(path: Any) -> None:
    got, want = apg(*laws(), scale=3.0, eta=1.0, momentum=0.0), cfg(*laws(), scale=3.0)
    for node in at(path, TIMES[1:]).nodes:
        a, b = got(state(), node), want(state(), node)
        assert torch.allclose(a.x0, b.x0, rtol=1e-12, atol=1e-12)
        assert torch.allclose(a.eps, b.eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", CASES)
def test_what_is_answered_is_one_state(name: str, path: Any) -> None:
    """x = alpha x0 + sigma eps, so that solvers in x0 and in eps are guided alike; only CFG++ moves x, on purpose."""
    guided, moved = CASES[name][0](*laws()), name == "cfg_pp"
    for node in at(path, TIMES).nodes:
        p = guided(state(), node)
        assert torch.allclose(node.alpha * p.x0 + node.sigma * p.eps, p.x, atol=1e-9 * (1 + node.sigma))
        assert torch.equal(p.x, state()) != (moved and node.alpha > 0)


def test_a_learned_variance_passes_through() -> None:
    def with_spread(x: Tensor, node: Any) -> Prediction:
        p = Gaussian().denoise(x, node)
        return Prediction(x, p.x0, p.eps, spread=torch.full_like(x, 0.3))

    node = at(Flow(), TIMES).nodes[1]
    for name in set(CASES) - {"zero_star", "zero_star of two zeros"}:  # which ask no network there
        spread = CASES[name][0](with_spread, with_spread)(state(), node).spread
        assert spread is not None and bool((spread == 0.3).all()), name
