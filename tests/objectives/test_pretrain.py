"""Objectives vanish, or are least, where their theory says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hasten.objectives.pretrain.flow_matching import FlowMatching
from hasten.objectives.pretrain.reconstruct import Reconstruct
from hasten.objectives.pretrain.v_prediction import VPrediction
from hasten.path import Path
from hasten.paths.cosine import Cosine
from hasten.paths.discrete import scaled_linear, to_pure_noise


class OnePoint(nn.Module):
    """The exact velocity where all data is one point c: (x - c) / t, since eps = (x - (1 - t) c) / t."""

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return (x - c) / t.reshape(-1, 1)


@pytest.mark.system("flow-matching", "rectified-flow")
def test_flow_matching_is_zero_at_the_exact_velocity_of_one_point() -> None:
    c = torch.tensor([0.3, -1.2, 2.0]).expand(64, 3)
    rng = torch.Generator().manual_seed(0)
    loss = FlowMatching().loss({"denoiser": OnePoint()}, {"x0": c, "c": c}, rng)
    assert loss < 1e-9
    off = FlowMatching().loss({"denoiser": OnePoint()}, {"x0": c, "c": c + 0.1}, rng)
    assert off > 1e-3


class Affine(nn.Module):
    """Velocity of the exact minimiser for Gaussian data N(m, v), times `scale`."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        from hasten.grid import at
        from hasten.paths.flow import Flow
        from hasten.reference.laws import Gaussian

        out = []
        for xi, ti in zip(x, t.tolist(), strict=True):
            p = Gaussian().denoise(xi, at(Flow(), [ti, 0.0]).nodes[0])
            out.append(p.eps - p.x0)
        return self.scale * torch.stack(out)


@pytest.mark.system("flow-matching")
def test_flow_matching_is_least_at_the_conditional_mean() -> None:
    rng = torch.Generator().manual_seed(1)
    x0 = 0.7 + 0.5 * torch.randn(400, 1, generator=rng)

    def loss(scale: float) -> float:
        return float(FlowMatching().loss({"denoiser": Affine(scale)}, {"x0": x0}, torch.Generator().manual_seed(2)))

    assert loss(1.0) < min(loss(0.8), loss(1.2))


class SlopeOfOnePoint(nn.Module):
    """The exact v where all data is one point c: alpha eps - sigma c with eps = (x - alpha c) / sigma."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        alpha, sigma = self.path.alpha(t[:, None]), self.path.sigma(t[:, None])
        return alpha * (x - alpha * c) / sigma - sigma * c


@pytest.mark.parametrize("path", [scaled_linear(), to_pure_noise(scaled_linear()), Cosine()])
def test_v_prediction_is_zero_at_the_exact_v_of_one_point(path: Path) -> None:
    c = torch.tensor([0.3, -1.2, 2.0]).expand(64, 3)
    rng = torch.Generator().manual_seed(0)
    loss = VPrediction(path).loss({"denoiser": SlopeOfOnePoint(path)}, {"x0": c, "c": c}, rng)
    assert loss < 1e-9
    off = VPrediction(path).loss({"denoiser": SlopeOfOnePoint(path)}, {"x0": c, "c": c + 0.1}, rng)
    assert off > 1e-3


class Slope(nn.Module):
    """v of the exact minimiser for Gaussian data N(m, v), times `scale`; notes the times it is asked at."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.seen = scale, torch.empty(0)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        from hasten.grid import at
        from hasten.reference.laws import Gaussian

        self.seen, out = t, []
        for xi, ti in zip(x, t.tolist(), strict=True):
            n = at(scaled_linear(), [ti, 0.0]).nodes[0]
            p = Gaussian().denoise(xi, n)
            out.append(n.alpha * p.eps - n.sigma * p.x0)
        return self.scale * torch.stack(out)


def test_v_prediction_is_least_at_the_conditional_mean() -> None:
    rng = torch.Generator().manual_seed(1)
    x0 = 0.7 + 0.5 * torch.randn(400, 1, generator=rng)

    def loss(scale: float) -> float:
        return float(VPrediction().loss({"denoiser": Slope(scale)}, {"x0": x0}, torch.Generator().manual_seed(2)))

    assert loss(1.0) < min(loss(0.8), loss(1.2))


def test_v_prediction_asks_at_every_step_of_its_table_as_often() -> None:
    net, seen = Slope(1.0), []
    for seed in range(200):
        VPrediction(steps=10).loss({"denoiser": net}, {"x0": torch.zeros(4, 1)}, torch.Generator().manual_seed(seed))
        assert float(net.seen.max() - net.seen.min()) > 0.5  # even over the batch
        seen.append(net.seen)
    times, counts = (torch.cat(seen) * 10).round().long().unique(return_counts=True)
    assert times.tolist() == list(range(1, 11))
    assert (counts - 80).abs().max() < 30


class Identity(nn.Module):
    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - x.mean((0, 2, 3), True)) / x.std((0, 2, 3), unbiased=True, keepdim=True)
        return x + noise, z


def test_reconstruct_is_zero_for_a_perfect_autoencoder_with_standard_latents() -> None:
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    batch = {"x": x, "noise": torch.ones_like(x)}
    nets = {"autoencoder": Identity()}
    assert Reconstruct(noise=0.0).loss(nets, batch, torch.Generator()) < 1e-9
    noisy = Reconstruct(noise=0.1, penalty=0.0).loss(nets, batch, torch.Generator())
    assert torch.allclose(noisy, torch.tensor(0.1**2 + 0.1 * 0.1), rtol=1e-4)
