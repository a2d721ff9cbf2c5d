"""Classifier guidance: exactly Bayes' rule where the posterior is exact, and a trained classifier that steers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from glyphs import PIXELS, Digits
from torch import Tensor, nn

from hasten.grid import at, build
from hasten.grids.uniform import uniform
from hasten.guidance.classifier import classifier
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.drive import solve
from hasten.solvers.heun import heun

LAW = Mixture()  # three parts; class 0 is the outer two, class 1 the middle one
CLASSES = (Mixture(means=(-1.0, 1.5), weights=(0.6, 0.4)), Mixture(means=(0.5,), weights=(1.0,)))
PATHS = [pytest.param(p, id=type(p).__name__) for p in (Flow(), EDM(8.0), Preserving())]


def posterior(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact log p(y | x_t) of x [B, 1], [B, 2]: Gaussians noised are Gaussians."""
    means, weights = torch.tensor(LAW.means, dtype=torch.float64), torch.tensor(LAW.weights, dtype=torch.float64)

    def logits(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        parts = weights.log() - (x - alpha * means) ** 2 / (2 * (LAW.var * alpha**2 + sigma**2))
        return torch.stack([parts[:, [0, 2]].logsumexp(-1), parts[:, 1]], -1)

    return logits


@pytest.mark.system("adm")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("y", [0, 1])
def test_with_the_exact_posterior_scale_1_is_the_conditional_denoiser(path: Any, y: int) -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    guided = classifier(LAW.denoise, posterior(path), torch.full((41,), y))
    for node in at(path, [0.9, 0.5, 0.2, 0.05]).nodes:
        got, want = guided(x, node), CLASSES[y].denoise(x, node)
        assert torch.allclose(got.x0, want.x0, atol=1e-6)  # the laws' weights are float32
        assert torch.allclose(got.eps, want.eps, atol=1e-6)


@pytest.mark.system("adm")
@pytest.mark.parametrize("y", [0, 1])
def test_guided_samples_have_the_density_of_the_class(y: int) -> None:
    """20,000 samples against the exact distribution of p(x | y), by Kolmogorov's distance: measured 0.009 and 0.011,
    where chance is 0.006 to 0.014, and 0.29 from p(x), 0.58 from the other class."""
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = build(Flow(), uniform, 60)
    drawn = solve(heun, classifier(LAW.denoise, posterior(Flow()), torch.full((20_000,), y)), x, grid)
    near = [distance(drawn, CLASSES[y]), distance(drawn, LAW), distance(drawn, CLASSES[1 - y])]
    assert near[0] < 0.015
    assert min(near[1:]) > 0.2


def distance(drawn: Tensor, law: Mixture) -> float:
    """Kolmogorov's, between draws [N, 1] and a law."""
    points = drawn[:, 0].sort().values
    means, weights = torch.tensor(law.means).double(), torch.tensor(law.weights).double()
    below = (torch.special.ndtr((points[:, None] - means) / law.var**0.5) * weights).sum(-1)
    return float((below - torch.arange(1, len(points) + 1) / len(points)).abs().max())


class Small(nn.Module):
    """A classifier that is told the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(PIXELS + 1, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 10)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def trained(law: Digits) -> Small:
    """On noised digits of the straight path, 300 steps."""
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Small()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(300):
        x0, labels = law.sample(256, rng)
        t = torch.rand(256, generator=rng)
        x = (1 - t[:, None]) * x0 + t[:, None] * torch.randn(256, PIXELS, generator=rng)
        loss = nn.functional.cross_entropy(network(x, t), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.system("adm")
def test_a_small_classifier_of_noisy_digits_raises_the_accuracy_of_an_unconditional_model() -> None:
    """Measured: 0.10 without, 0.61 at scale 1, 0.78 at 2, 0.82 at 4; the exact conditional denoiser has 0.84."""
    law, labels = Digits(0.5), torch.arange(10).repeat(50)
    network = trained(law)
    x, grid = torch.randn(500, PIXELS, generator=torch.Generator().manual_seed(1)), build(Flow(), uniform, 20)
    with torch.inference_mode():  # as pipelines run
        drawn = [
            solve(ddim, classifier(law.denoise(), network, labels, scale=s), x, grid) for s in (0.0, 1.0, 2.0, 4.0)
        ]
    accuracy = [law.accuracy(y, labels) for y in drawn]
    assert accuracy == sorted(accuracy)
    assert accuracy[0] < 0.13 and accuracy[1] > 0.5 and accuracy[2] > 0.7
    assert all(p.grad is None or p.grad.abs().max() < 1 for p in network.parameters())  # training's, not more
    assert not drawn[-1].requires_grad


def test_labels_and_logits_that_do_not_fit_are_told() -> None:
    node, x = at(Flow(), [0.5, 0.0]).nodes[0], torch.zeros(4, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"4 rows were expected; given 3 labels and logits \[4, 2\]"):
        classifier(LAW.denoise, posterior(Flow()), torch.zeros(3, dtype=torch.long))(x, node)
    with pytest.raises(ValueError, match=r"logits \[4\]"):
        classifier(LAW.denoise, lambda x, t: x[:, 0], torch.zeros(4, dtype=torch.long))(x, node)
