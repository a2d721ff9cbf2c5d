"""The bound of variational diffusion: its value on a Gaussian, what it does not depend on, what learning changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hasten.objectives.pretrain.variational import Variational
from hasten.paths.learned import Ends, Rising
from hasten.train.optimizer import adamw

pytestmark = pytest.mark.system("vdm")
MEAN, VAR = 0.7, 0.25
SHAPES = {
    "even": torch.clone,
    "cosine": lambda t: (1 - torch.cos(math.pi * t)) / 2 * 0.99 + 0.01 * t,
    "early": lambda t: t**0.5 * 0.9 + 0.1 * t,
    "learned": Rising(16, torch.Generator().manual_seed(3)).double(),
}


class Exact(nn.Module):
    """E[eps | x] of Gaussian data, told the time on the path of even gamma from `first` to `last`, plus an offset that
    is a weight."""

    def __init__(self, first: float, last: float) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.off = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        gamma = (self.first + (self.last - self.first) * u).reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return sigma * (x - alpha * MEAN) / (alpha**2 * VAR + sigma**2) + self.off.to(x)


def data(size: int, seed: int = 0, elements: int = 2) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {"x0": MEAN + VAR**0.5 * torch.randn(size, elements, generator=rng, dtype=torch.float64)}


def entropy() -> float:
    """The mean of -log p(x0), an element."""
    return 0.5 * math.log(2 * math.pi * math.e * VAR)


def slack(first: float, last: float) -> float:
    """What the bound is above the entropy for the exact denoiser, an element: the divergence of the law of x_1 from
    pure noise, and of the law of x0 at a given x_0 from the decoder."""
    alpha2, sigma2 = 1 / (1 + math.exp(last)), 1 / (1 + math.exp(-last))
    var = alpha2 * VAR + sigma2
    prior = (var + alpha2 * MEAN**2 - 1 - math.log(var)) / 2
    ratio = math.exp(first)  # sigma_0^2 / alpha_0^2, the decoder's variance
    posterior = VAR * ratio / (VAR + ratio)
    # the posterior's mean is off from x_0 / alpha_0 by ratio / (VAR + ratio) times its deviation from MEAN
    off = (ratio / (VAR + ratio)) ** 2 * (VAR + ratio)
    return prior + (posterior / ratio - 1 - math.log(posterior / ratio) + off / ratio) / 2


@pytest.mark.parametrize(("first", "last"), [(-13.3, 5.0), (-8.0, 3.0), (-3.0, 1.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_on_a_gaussian_is_its_entropy_and_a_known_slack(shape: str, first: float, last: float) -> None:
    """The same for every shape of the schedule, since only its ends count; ends far apart leave the entropy alone."""
    nets = {"denoiser": Exact(first, last), "shape": SHAPES[shape]}
    with torch.no_grad():  # each of its 3 million draws deviates by about half of gamma's range
        got = Variational(first, last).bound(nets, data(3000, elements=1000), torch.Generator().manual_seed(1))
    assert abs(float(got.mean()) - entropy() - slack(first, last)) < 0.001 * (last - first)
    assert slack(-13.3, 5.0) < 0.003 < slack(-8.0, 3.0) < slack(-3.0, 1.0)


def test_a_worse_network_has_a_higher_bound() -> None:
    """By half the square of its error times the range of gamma."""
    net, objective, batch = Exact(-8.0, 4.0), Variational(-8.0, 4.0), data(1000, elements=1000)
    with torch.no_grad():
        plain = objective.loss({"denoiser": net}, batch, torch.Generator().manual_seed(2))
        net.off.add_(0.1)
        worse = objective.loss({"denoiser": net}, batch, torch.Generator().manual_seed(2))
    assert float(worse - plain) == pytest.approx(0.5 * 12 * 0.1**2, rel=0.1)


def test_each_phase_reaches_its_own_nets_alone() -> None:
    nets = {"denoiser": Exact(-8.0, 4.0), "ends": Ends(-8.0, 4.0), "shape": Rising(8)}
    for phase in Variational(learns=True).phases():
        loss = phase.loss(nets, data(64), torch.Generator().manual_seed(3))
        reached = {
            name
            for name, net in nets.items()
            for g in torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
            if g is not None and g.abs().sum() > 0
        }
        assert reached == set(phase.trains)
    assert [p.trains for p in Variational().phases()] == [("denoiser",)]


def test_a_learnt_shape_lowers_the_variance_and_not_the_mean() -> None:
    objective = Variational(-13.3, 5.0, learns=True)
    shape = Rising(32, torch.Generator().manual_seed(4))
    nets = {"denoiser": Exact(-13.3, 5.0), "shape": shape}
    (moves,) = adamw([shape], 0.03)

    def spread() -> tuple[float, float]:
        with torch.no_grad():
            got = objective.bound(nets, data(50_000, 1), torch.Generator().manual_seed(5))
        return float(got.mean()), float(got.var())

    mean, before = spread()
    for step in range(150):
        loss = objective.variance(nets, data(256, step + 2), torch.Generator().manual_seed(step))
        moves.zero_grad()
        loss.backward()
        moves.step()
    after_mean, after = spread()
    assert after < 0.8 * before, (before, after)
    assert abs(after_mean - mean) < 6 * (before / 50_000) ** 0.5


def test_learnt_ends_widen_where_that_tightens_the_bound() -> None:
    """On a Gaussian every widening does; the bound falls towards the entropy."""
    ends = Ends(-3.0, 1.0)

    class Told(nn.Module):
        def forward(self, x: Tensor, u: Tensor) -> Tensor:
            first, last = (float(e.detach()) for e in ends())
            return Exact(first, last)(x, u)

    nets, objective = {"denoiser": Told(), "ends": ends}, Variational(learns=True)
    (moves,) = adamw([ends], 0.05)
    for step in range(60):
        moves.zero_grad()
        objective.loss(nets, data(2000, step), torch.Generator().manual_seed(step)).backward()
        moves.step()
    first, last = (float(e.detach()) for e in ends())
    assert first < -4
    assert last > 1.5
    assert slack(first, last) < 0.5 * slack(-3.0, 1.0)


def test_pictures_have_one_bound_a_row() -> None:
    x0 = torch.randn(6, 3, 4, 4)
    nets = {"denoiser": lambda x, u: x * 0.5, "shape": Rising(4)}
    assert Variational().bound(nets, {"x0": x0}, torch.Generator().manual_seed(0)).shape == (6,)
