"""The training loop: learns a law in seconds, resumes exactly, never reads what was half written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hasten.grid import at
from hasten.objectives.pretrain.flow_matching import FlowMatching
from hasten.paths.flow import Flow
from hasten.reference.laws import Mixture
from hasten.train.ema import Ema
from hasten.train.loop import train
from hasten.train.optimizer import adamw, muon, trapezoid


class Velocity(nn.Module):
    """A small velocity field on the line."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def batch(step: int, rng: torch.Generator) -> dict[str, Tensor]:
    return {"x0": Mixture().sample(256, rng)[:, None]}


def run(folder: Path, until: int, net: nn.Module | None = None, every: int = 10, **more: object) -> nn.Module:
    net = net or Velocity()
    options = {"optimizers": adamw, "rate": trapezoid(40, 5), "decay": 0.9} | more
    train(FlowMatching(), {"denoiser": net}, batch, until=until, folder=folder, every=every, device="cpu", **options)
    return net


def test_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    """40 steps at once, and 20, a new process's objects, then 20: the same weights, bit for bit."""
    whole = run(tmp_path / "a", 40)
    run(tmp_path / "b", 20)
    resumed = run(tmp_path / "b", 40)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_muon_resumes_exactly_too(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", 20, optimizers=muon)
    run(tmp_path / "b", 10, optimizers=muon)
    resumed = run(tmp_path / "b", 20, optimizers=muon)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_a_kill_leaves_half_written_is_never_read(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", 40)
    run(tmp_path / "b", 20)
    (tmp_path / "b" / ".checkpoint-1").mkdir()
    (tmp_path / "b" / ".checkpoint-1" / "step").write_text("39")  # killed while writing
    (tmp_path / "b" / "checkpoint").rename(tmp_path / "b" / "checkpoint.old")  # killed between the two renames
    resumed = run(tmp_path / "b", 40)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.system("flow-matching", "rectified-flow")
def test_learns_a_law_whose_samples_match(tmp_path: Path) -> None:
    """Seconds of training on the mixture: samples by Euler have its mean, variance and weight of each part."""
    from hasten import tree
    from hasten.denoiser import denoiser
    from hasten.solvers.drive import solve

    net = run(tmp_path, 600, rate=trapezoid(600, 20), decay=0.99, every=600).float()
    rng = torch.Generator().manual_seed(5)
    grid = at(Flow(), [1 - i / 40 for i in range(41)])
    with torch.no_grad():
        x = solve(tree.function("solvers", "heun"), denoiser(net, "flow"), torch.randn(4000, 1, generator=rng), grid)
    truth = Mixture().sample(4000, rng)
    assert abs(float(x.mean() - truth.mean())) < 0.12
    assert abs(float(x.var() - truth.var())) < 0.2
    for low, high in ((-2.5, -0.25), (-0.25, 1.0), (1.0, 2.5)):
        share = [float(((v > low) & (v < high)).float().mean()) for v in (x.flatten(), truth)]
        assert abs(share[0] - share[1]) < 0.08


def test_ema_is_the_average_it_says() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 0.0)
    ema = Ema({"n": net}, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 2.0, 4.0, 8.0]):
        nn.init.constant_(net.weight, value)
        decay = min(0.5, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * value
        ema.update({"n": net})
    ema.copy_to({"n": net})
    assert net.weight.item() == pytest.approx(expected, rel=1e-6)


def test_muon_moves_block_matrices_and_adam_the_rest() -> None:
    from torch.optim import Muon

    net = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)]), "embed": nn.Linear(4, 4)})
    first, second = muon([net])
    assert isinstance(first, Muon)
    assert [p is net["blocks"][0].weight for g in first.param_groups for p in g["params"]] == [True]
    assert sum(len(g["params"]) for g in second.param_groups) == 3


def test_muon_moves_a_kernel_as_the_matrix_that_it_is_read_as() -> None:
    """One step on a convolution and on a linear layer of the same weights and gradients: the same weights after, for
    any scale of the gradient; gradients are gone."""
    rng = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(6, 4, 3, 3, generator=rng) for _ in range(2))
    moved = []
    for scale in (1.0, 1000.0):
        nets = nn.Conv2d(4, 6, 3), nn.Linear(36, 6)
        for net in nets:
            with torch.no_grad():
                net.weight.copy_(weight.reshape(net.weight.shape))
            net.weight.grad = scale * gradient.reshape(net.weight.shape)
            mover, rest = muon([nn.ModuleDict({"block": net})])
            assert [p is net.bias for g in rest.param_groups for p in g["params"]] == [True]
            mover.step()
            mover.zero_grad()
            assert net.weight.grad is None
            moved.append(net.weight.detach().flatten(1))
    assert all(torch.equal(m, moved[0]) for m in moved[1:2])
    assert all(torch.allclose(m, moved[0], atol=1e-3) for m in moved)
    assert not torch.allclose(moved[0], weight.flatten(1), atol=1e-3)
