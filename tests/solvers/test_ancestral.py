"""DDPM, improved DDPM, DDIM's eta and k-diffusion's ancestral Euler: one step, its exact cases, and its peers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from affine import exact, moments
from hasten import tree
from hasten.bridge.process import process
from hasten.brownian import Brownian
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.cosine import Cosine
from hasten.paths.discrete import cosine
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.ddim import ddim
from hasten.solvers.ddpm import ddpm
from hasten.solvers.drive import solve, visited
from hasten.solvers.euler_ancestral import euler_ancestral

PATHS = [Flow(), EDM(5.0), Preserving()]
X = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]


def told(value: Any) -> str:
    return type(value).__name__


def coarse(path: Path) -> Grid:
    """Four uneven steps from the path's end to clean."""
    return at(path, [1.0, 0.8, 0.45, 0.2, 0.0])


def drawn(seed: int) -> Any:
    """Noise of a generator, in the order it is asked for: what diffusers draws."""
    rng = torch.Generator().manual_seed(seed)
    return lambda start, stop, like: torch.randn(like.shape, generator=rng, dtype=like.dtype)


@pytest.mark.system("ddim", "ddpm")
@pytest.mark.parametrize("path", PATHS, ids=told)
@pytest.mark.parametrize("solver", [ddpm, euler_ancestral], ids=lambda s: s.name)
def test_without_noise_it_is_ddim_bit_for_bit(solver: Any, path: Path) -> None:
    law, grid = Mixture(), coarse(path)
    got = solve(solver.given(eta=0.0), law.denoise, X, grid, drawn(1))
    assert torch.equal(got, solve(ddim, law.denoise, X, grid))


@pytest.mark.system("ddpm", "ddim")
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("path", PATHS, ids=told)
def test_one_data_point_is_sampled_exactly_in_any_steps(path: Path, eta: float) -> None:
    """Were x0 known, every state would have its level's law, alpha x0 and sigma^2, whatever the steps and the noise."""
    law = Gaussian(0.7, 0.0)
    for times in ([1.0, 0.3], [1.0, 0.8, 0.45, 0.2], [0.9, 0.05, 0.04]):
        errors = moments(ddpm.given(eta=eta), at(path, times), law)
        assert max(map(abs, errors)) < 1e-14 * max(1, exact(law, at(path, times).nodes[0])[1])


@pytest.mark.system("ddpm")
@pytest.mark.parametrize("path", PATHS, ids=told)
def test_its_step_is_bayes_rule(path: Path) -> None:
    """A slow reference: q(x' | x, x0) as the product of the two Gaussians q(x | x') and q(x' | x0). Ho et al. 2020,
    eq. 6-7."""
    now, after = at(path, [0.7, 0.4]).nodes
    a = now.alpha / after.alpha
    b = now.sigma**2 - (a * after.sigma) ** 2
    x0, x = torch.tensor([0.3], dtype=torch.float64), torch.tensor([1.7], dtype=torch.float64)
    var = 1 / (a**2 / b + 1 / after.sigma**2)
    mean = var * (a * x / b + after.alpha * x0 / after.sigma**2)

    def denoise(x: Tensor, n: Node) -> Prediction:
        return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)

    for z in (0.0, 1.0):
        got = solve(ddpm, denoise, x, Grid((now, after)), lambda *_, z=z: torch.full_like(x, z))
        assert float(got - mean) == pytest.approx(z * var**0.5, abs=1e-14)
        large = solve(
            ddpm.given(variance="large"), denoise, x, Grid((now, after)), lambda *_, z=z: torch.full_like(x, z)
        )
        assert float(large - mean) == pytest.approx(z * b**0.5, abs=1e-14)  # "fixedlarge": that of q(x | x')


class Learned:
    """The law's denoiser, which also says the variance of p(x' | x), as a perfectly trained network would: the
    posterior's, and what x0 leaves open. `grid` tells it where the step from a node goes."""

    def __init__(self, law: Gaussian | Mixture, grid: Grid) -> None:
        self.law, self.after = law, dict(grid.steps())

    def __call__(self, x: Tensor, n: Node) -> Prediction:
        p, m = self.law.denoise(x, n), self.after[n]
        if m.clean:
            return replace(p, spread=torch.zeros_like(x))
        fresh = 1 - (n.alpha * m.sigma / (n.sigma * m.alpha)) ** 2
        small, large = m.sigma**2 * fresh, n.sigma**2 * fresh
        var = small + (m.alpha * fresh) ** 2 * self.left_open(x, n)
        return replace(p, spread=2 * (var / small).log() / math.log(large / small) - 1)

    def left_open(self, x: Tensor, n: Node) -> Tensor:
        """The variance of x0 given x; sigma^2 / alpha times the slope of E[x0 | x], by Tweedie's formula."""
        h = 1e-4 * n.sigma
        slope = (self.law.denoise(x + h, n).x0 - self.law.denoise(x - h, n).x0) / (2 * h)
        return n.sigma**2 / n.alpha * slope


@pytest.mark.system("iddpm")
@pytest.mark.parametrize("path", [Preserving(), Cosine()], ids=told)
def test_with_the_right_learned_variance_a_gaussian_is_exact_in_five_steps(path: Path) -> None:
    """Nichol & Dhariwal 2021, eq. 15: log variance is interpolated between the posterior's and beta. For a Gaussian the
    true variance lies between, and with it every step has the law's p(x' | x); the two fixed ones err."""
    law, grid = Gaussian(0.7, 0.25), at(path, [0.95, 0.8, 0.5, 0.3, 0.15, 0.05])
    mean, var = moments(ddpm.given(variance="learned"), grid, law, Learned(law, grid))
    assert abs(mean) < 1e-9 and abs(var) < 1e-9
    assert moments(ddpm.given(variance="small"), grid, law)[1] < -0.02
    assert moments(ddpm.given(variance="large"), grid, law)[1] > 0.02


@pytest.mark.system("iddpm")
def test_a_respaced_chain_of_50_steps_keeps_the_marginals_of_the_full_one() -> None:
    """On a mixture, on the cosine table of 1000 steps: mean, variance and the shares of the outer modes, within four
    Monte-Carlo errors. It takes the right learned variance; with the posterior alone, 50 steps lose 4% and more."""
    law, path, size = Mixture(), cosine(), 8_000
    x = torch.randn(size, 1, generator=torch.Generator().manual_seed(2)).double()
    truth = law.sample(20 * size, torch.Generator().manual_seed(3))

    def told_by(x: Tensor) -> Tensor:
        """Mean, variance, share left of the middle mode, and right of it."""
        return torch.stack([x.mean(), x.var(), (x < -0.25).double().mean(), (x > 1).double().mean()])

    def chain(steps: int, variance: str) -> Tensor:
        grid = at(path, [1 - i / steps for i in range(steps + 1)])
        denoise = Learned(law, grid) if variance == "learned" else law.denoise
        return told_by(solve(ddpm.given(variance=variance), denoise, x, grid, drawn(steps)))

    errors = 4 / size**0.5 * torch.tensor([0.96, 1.1, 0.46, 0.4])
    full, few, small = chain(1000, "small"), chain(50, "learned"), chain(50, "small")
    assert ((full - told_by(truth.double())).abs() < errors).all()
    assert ((few - full).abs() < errors).all()
    assert small[1] < 0.96 * few[1], (full, few, small)


@pytest.mark.system("ddpm", "ddim")
@pytest.mark.parametrize("solver", [ddpm, euler_ancestral], ids=lambda s: s.name)
def test_ancestral_euler_is_k_diffusions_rule_and_ddpm(solver: Any) -> None:
    """A slow reference in x / alpha: down to r_down by Euler, then up by r_up. It is DDIM's step with the same eta."""
    law = Mixture()
    for path in PATHS:
        for eta in (0.3, 1.0):
            grid = at(path, [0.9, 0.8, 0.45, 0.2])
            got = solve(solver.given(eta=eta), law.denoise, X, grid, Brownian([4]))
            y, noise = X / grid.nodes[0].alpha, Brownian([4])
            for now, after in grid.steps():
                r, r_after = now.sigma / now.alpha, after.sigma / after.alpha
                up = min(r_after, eta * math.sqrt(r_after**2 * (r**2 - r_after**2) / r**2))
                x0 = law.denoise(y * now.alpha, now).x0
                y = y + (y - x0) / r * (math.sqrt(r_after**2 - up**2) - r)
                y = y + up * noise(r**-2, r_after**-2, y)
            assert (got - y * grid.nodes[-1].alpha).abs().max() < 1e-12


def test_s_noise_scales_the_noise() -> None:
    law, grid = Mixture(), at(Flow(), [0.9, 0.5])
    still, one, some = (
        solve(euler_ancestral.given(s_noise=s), law.denoise, X, grid, Brownian([4])) for s in (0.0, 1.0, 1.1)
    )
    assert torch.allclose(some - still, 1.1 * (one - still), atol=1e-14)


def test_a_learned_variance_that_no_network_says_is_refused() -> None:
    learned, grid = ddpm.given(variance="learned"), coarse(Flow())
    with pytest.raises(ValueError, match="variance = learned needs a network that says its variance"):
        solve(learned, Mixture().denoise, X, grid, Brownian([1]))
    assert visited(learned, grid) == list(grid.nodes[:-1])  # a pipeline asks for its times before any network speaks


@pytest.mark.system("ddpm")
@pytest.mark.parametrize("path", [Flow(), Preserving()], ids=told)
def test_samples_of_other_step_counts_with_one_seed_are_alike(path: Path) -> None:
    law, x = Mixture(), torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))

    def sample(steps: int, seed: int) -> Tensor:
        grid = at(path, [1 - i / steps for i in range(steps + 1)])
        return solve(ddpm, law.denoise, x, grid, Brownian([seed]))[:, 0]

    alike = torch.corrcoef(torch.stack([sample(20, 7), sample(28, 7), sample(40, 7), sample(28, 8)]))[0]
    assert (alike[1:3] > 0.9).all()
    assert alike[3] < 0.2


@pytest.mark.parametrize("given", [{"eta": 1.5}, {"eta": -0.1}, {"variance": "middle"}, {"ets": 1.0}])
def test_settings_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        tree.checked(ddpm, given)


def test_noise_must_be_given() -> None:
    with pytest.raises(ValueError, match="ddpm adds noise: give it some"):
        solve(ddpm, Mixture().denoise, X, coarse(Flow()))


BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}


def peer(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """diffusers' scheduler, our solver and what to tell its step."""
    from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler

    match kind.split():
        case ["ddim", eta]:
            return DDIMScheduler(**BETAS, clip_sample=False), ddpm.given(eta=float(eta)), {"eta": float(eta)}
        case ["euler"]:
            return EulerAncestralDiscreteScheduler(**BETAS), euler_ancestral, {}
        case [name]:
            variance = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}[name]
            spacing = BETAS | {"timestep_spacing": "leading"}  # which ends at step 0: see the test below
            return DDPMScheduler(**spacing, clip_sample=False, variance_type=name), ddpm.given(variance=variance), {}
    raise ValueError(kind)


@pytest.mark.system("ddpm", "iddpm", "ddim")
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range", "ddim 1.0", "ddim 0.5", "euler"])
def test_equals_diffusers_on_the_same_noise(kind: str) -> None:
    """In float32, stepped by hand on its own integer times, with the draws of one generator."""
    theirs, solver, told = peer(kind)
    theirs.set_timesteps(10)
    known, law, size = process(theirs), Mixture(), (6, 1, 4, 4)
    x = torch.randn(size, generator=torch.Generator().manual_seed(5))
    grid = at(known.path, [known.t(t) for t in theirs.timesteps.tolist()] + [0.0])

    def network(x: Tensor, n: Node) -> Tensor:
        eps = law.denoise(x.double(), n).eps.float()
        return torch.cat([eps, torch.sin(7 * x)], 1) if kind == "learned_range" else eps

    with torch.no_grad():
        ours = solve(solver, lambda x, n: known.read(network(x, n), x, n), x, grid, drawn(6))
        scale = 1.0 if kind != "euler" else 1 / grid.nodes[0].alpha  # it holds x / alpha
        y, rng = x * scale, torch.Generator().manual_seed(6)
        for t, n in zip(theirs.timesteps, grid.nodes, strict=False):
            said = network(theirs.scale_model_input(y, t), n)
            y = theirs.step(said, t if kind == "euler" else int(t), y, generator=rng, **told).prev_sample
    assert (ours - y).abs().max() < 1e-4


@pytest.mark.system("ddpm")
def test_diffusers_adds_noise_to_a_clean_end_where_its_times_do_not_end_at_zero() -> None:
    """A difference. diffusers leaves the noise out of step 0 alone; with trailing times the last of 10 steps is at 99,
    goes to alpha_bar = 1, and with the large variance adds 1 - alpha_bar_99 = 0.104 to the sample. The law is the
    judge: its variance is 0.25, and no noise belongs into a clean end (Ho et al. 2020, alg. 2, line 3)."""
    from diffusers import DDPMScheduler

    theirs, law = DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_large"), Gaussian()
    theirs.set_timesteps(10)
    path, rng = process(theirs).path, torch.Generator().manual_seed(6)
    left = 1 - float(theirs.alphas_cumprod[99])
    now, clean = at(path, [0.1, 0.0]).nodes
    x = now.alpha * law.mean + exact(law, now)[1] ** 0.5 * torch.randn(40_000, 1, generator=rng)
    p = law.denoise(x, now)
    y = theirs.step(p.eps, 99, x, generator=rng).prev_sample
    ours = solve(ddpm.given(variance="large"), law.denoise, x, Grid((now, clean)), drawn(6))
    assert torch.allclose(ours, p.x0, atol=1e-6)
    assert float((y - p.x0).var()) == pytest.approx(left, rel=0.05)
