"""Truncated starts: nothing at one end, the plain run at the other, and calls paid in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.brownian import Brownian
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Mixture
from hasten.solvers.drive import solve, visited
from hasten.start.noised import noised, sample, tail

DDIM = tree.function("solvers", "ddim")
HEUN = tree.function("solvers", "heun")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def even(path: object, steps: int) -> Grid:
    return at(path, [1 - i / steps for i in range(steps + 1)])  # type: ignore[arg-type]


def test_noise_is_put_on_to_the_nodes_level() -> None:
    x0, node = torch.full((50_000,), 0.7, dtype=torch.float64), even(Preserving(), 4).nodes[1]
    x = noised(x0, node, seeded(0))
    assert x.dtype == torch.float64
    assert float(x.mean()) == pytest.approx(node.alpha * 0.7, abs=0.02)
    assert float(x.std()) == pytest.approx(node.sigma, rel=0.02)
    assert torch.equal(x, noised(x0, node, seeded(0)))


@pytest.mark.system("es-ddpm")
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "consistent_annealed"])
def test_from_the_grids_start_it_is_the_plain_run_bit_for_bit(name: str) -> None:
    """T' = T: at pure noise nothing is left of the estimate."""
    law, solver, x0 = Mixture(), tree.function("solvers", name), torch.full((5, 2), 0.3)
    grid, eps = even(Flow(), 8), torch.randn(5, 2, generator=seeded(1))
    want = solve(solver, law.denoise, eps, grid, Brownian((0,)))
    assert torch.equal(sample(solver, law.denoise, x0, grid, 1.0, seeded(1), Brownian((0,))), want)


def test_from_the_grids_end_it_is_the_estimate_itself() -> None:
    x0 = torch.randn(3, 2, generator=seeded(0))
    assert sample(DDIM, Mixture().denoise, x0, even(EDM(), 8), 0.0, seeded(1)) is x0


@pytest.mark.parametrize(("solver", "last"), [(DDIM, 0), (HEUN, 1)], ids=["ddim", "heun"])
@pytest.mark.parametrize("t0", [0.1, 0.3, 0.5, 0.6, 0.95])
def test_a_late_start_pays_for_its_own_steps(solver: object, last: int, t0: float) -> None:
    asked: list[Node] = []

    def denoise(x: Tensor, n: Node) -> Prediction:
        asked.append(n)
        return Mixture().denoise(x, n)

    grid = even(Flow(), 20)
    sample(solver, denoise, torch.zeros(2), grid, t0, seeded(0))  # type: ignore[arg-type]
    steps = round(20 * t0)
    assert len(asked) == solver.calls * steps - last  # type: ignore[attr-defined]
    assert asked[0] == grid.nodes[20 - steps]


def test_between_two_times_it_starts_at_the_lower() -> None:
    grid = even(Flow(), 4)
    assert tail(grid, 0.74) == grid.since(2)
    assert tail(grid, 0.75) == grid.since(1)
    assert tail(grid, 0.1) is None


@pytest.mark.parametrize("t0", [-0.1, 1.5, float("nan")])
def test_a_time_outside_the_grid_is_refused(t0: float) -> None:
    with pytest.raises(ValueError, match=r"t0 is a time of the grid, from 1.0 to 0.0; got "):
        sample(DDIM, Mixture().denoise, torch.zeros(1), even(Flow(), 4), t0, seeded(0))


@pytest.mark.parametrize("t0", [0.2, 0.5, 0.9])
def test_the_sample_strays_from_the_guide_as_strength_grows(t0: float) -> None:
    """SDEdit: further from the guide, nearer to the law, here by the mean over starts off the law."""
    law, guide = Mixture(), torch.full((2000,), -2.5, dtype=torch.float64)
    less, more = (sample(DDIM, law.denoise, guide, even(Flow(), 40), t, seeded(0)) for t in (t0, t0 + 0.1))
    assert (more - guide).abs().mean() > (less - guide).abs().mean()


@pytest.mark.system("es-ddpm")
def test_what_a_bad_prior_gets_wrong_is_what_is_left_of_it_at_the_start() -> None:
    """Early stop's bound, exact in one dimension: the flow keeps quantiles, so the sample is as far from the law, in
    Kolmogorov's distance, as the noised prior is from the noised law; and noise takes from that distance."""
    law, size, t0 = Mixture(), 20_000, 0.4
    means, weights = (torch.tensor(v, dtype=torch.float64) for v in (law.means, law.weights))
    middle = float((means * weights).sum())
    deviation = float((weights * (means - middle) ** 2).sum() + law.var) ** 0.5

    def normal(x: Tensor) -> Tensor:
        return torch.special.ndtr(x)

    def cdf(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (normal((x[:, None] - alpha * means) / (law.var * alpha**2 + sigma**2) ** 0.5) * weights).sum(-1)

    def prior(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return normal((x - alpha * middle) / ((alpha * deviation) ** 2 + sigma**2) ** 0.5)

    grid, at_x = even(Flow(), 200), torch.linspace(-6, 6, 4001, dtype=torch.float64)
    rest = tail(grid, t0)
    assert rest is not None
    node = rest.nodes[0]
    bad, bound = ((cdf(at_x, *n) - prior(at_x, *n)).abs().max() for n in ((1.0, 0.0), (node.alpha, node.sigma)))
    x0 = middle + deviation * torch.randn(size, generator=seeded(0), dtype=torch.float64)
    y = sample(HEUN, law.denoise, x0, grid, t0, seeded(1)).sort().values
    rank = torch.arange(size, dtype=torch.float64) / size
    assert (cdf(y, 1.0, 0.0) - rank).abs().max() == pytest.approx(float(bound), abs=1.6 / size**0.5)
    assert bound < 0.5 * bad


@pytest.mark.system("es-ddpm")
def test_a_third_of_the_calls_brings_a_blurred_priors_pictures_near_the_full_chains() -> None:
    """Emoji of 8 x 8 grey pixels and the exact denoiser of their law; the prior is a linear autoencoder of six
    numbers, whose samples are blurred. Frechet distances to the pictures."""
    from hasten.measure.frechet import Moments, frechet
    from hasten.reference.emoji import pictures

    data = torch.nn.functional.avg_pool2d(pictures()[::4].float().mean(1, keepdim=True), 8).flatten(1)
    data = (data - data.mean()) / data.std()
    real = Moments.of(data)

    def denoise(x: Tensor, n: Node) -> Prediction:
        near = torch.softmax(-torch.cdist(x, n.alpha * data).square() / (2 * n.sigma**2), -1)
        return Prediction.of("x0", near @ data, x, n)

    values, vectors = torch.linalg.eigh(real.covariance.float())
    code = torch.randn(500, 6, generator=seeded(0)) * values[-6:].sqrt()
    blurred, grid = data.mean(0) + code @ vectors[:, -6:].T, even(Preserving(), 20)
    far = frechet(Moments.of(blurred), real)
    full = frechet(Moments.of(solve(DDIM, denoise, torch.randn(500, 64, generator=seeded(1)), grid)), real)
    rest = tail(grid, 0.3)
    assert rest is not None and len(visited(DDIM, rest)) == 0.3 * len(visited(DDIM, grid))
    late = frechet(Moments.of(sample(DDIM, denoise, blurred, grid, 0.3, seeded(2))), real)
    assert late < full + 0.15 * (far - full)
