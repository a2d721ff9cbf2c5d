"""Inverse problems on a law whose every answer is known: a Gaussian of correlated pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.brownian import Brownian
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.measure.frechet import Moments, frechet
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.solvers.drive import solve
from hasten.start.ccdf import ccdf, measured, projected
from hasten.start.noised import noised, tail

SIDE, PIXELS = 8, 64
PLACES = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
COVARIANCE = torch.exp(-torch.cdist(PLACES, PLACES) / 3)
VALUES, VECTORS = torch.linalg.eigh(COVARIANCE)
MASK = torch.ones(SIDE, SIDE, dtype=torch.float64)
MASK[2:6, 2:6] = 0


def denoise(x: Tensor, n: Node) -> Prediction:
    gain = n.alpha * VALUES / (n.alpha**2 * VALUES + n.sigma**2)
    x0 = (((x.flatten(1) @ VECTORS) * gain) @ VECTORS.T).view_as(x)
    return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)


def inside(x: Tensor) -> Tensor:
    return MASK * x


def blocks(x: Tensor) -> Tensor:
    small = torch.nn.functional.avg_pool2d(x, 2)
    return small.repeat_interleave(2, -1).repeat_interleave(2, -2)


PARTS = {"inpainting": inside, "super-resolution": blocks}
each_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


def truths(count: int) -> Tensor:
    z = torch.randn(count, PIXELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ((z * VALUES.sqrt()) @ VECTORS.T).view(count, 1, SIDE, SIDE)


def first(part: Callable[[Tensor], Tensor], known: Tensor) -> Tensor:
    """The reconstruction to start from: the enlarged picture, or the hole filled with the mean of what is known."""
    hole = (known.sum((-1, -2), keepdim=True) / MASK.sum()) * (1 - MASK)
    return known + hole if part is inside else known


def even(path: Flow | Preserving, steps: int) -> Grid:
    return at(path, [1 - i / steps for i in range(steps + 1)])


@pytest.mark.system("ccdf")
@each_part
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "consistent_annealed"])
@pytest.mark.parametrize("t0", [0.0, 0.2, 1.0])
def test_what_was_measured_is_met(t0: float, name: str, part: Callable[[Tensor], Tensor]) -> None:
    known, rng = part(truths(3)), torch.Generator().manual_seed(0)
    solver, project = tree.function("solvers", name), measured(part, known, rng)
    guess = first(part, known) + 0.1
    y = ccdf(solver, denoise, guess, even(Flow(), 10), t0, project, rng, Brownian((0,)))
    residual = (part(y) - known).abs().max()
    assert residual == 0 if part is inside else residual < 1e-14


@each_part
def test_the_projection_noises_what_is_known_and_leaves_the_rest(part: Callable[[Tensor], Tensor]) -> None:
    """Non-expansive: two states end no further apart than they were, and agree where it was measured."""
    node, known = even(Preserving(), 5).nodes[2], part(truths(2000))
    x = torch.randn(known.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = measured(part, known, torch.Generator().manual_seed(0))(x, node)
    again = measured(part, known, torch.Generator().manual_seed(0))(0 * x, node)
    assert torch.allclose(y - part(y), x - part(x))
    assert torch.allclose(part(y - again), torch.zeros_like(x), atol=1e-12)
    assert ((y - again).flatten(1).norm(dim=1) <= x.flatten(1).norm(dim=1)).all()
    noise = part(y) - node.alpha * known
    freedom = part(torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, 1, SIDE, SIDE)).flatten(1).trace() / PIXELS
    assert float(noise.var()) == pytest.approx(node.sigma**2 * float(freedom), rel=0.02)


@pytest.mark.system("ccdf")
@each_part
@pytest.mark.parametrize("name", ["ddim", "consistent_annealed"])
def test_a_fifth_of_the_calls_reaches_the_full_chains_error(name: str, part: Callable[[Tensor], Tensor]) -> None:
    """t0 = 0.2 from a plain reconstruction, against all steps from noise; and unlike the first reconstruction, whose
    error is small because it is smooth, the result looks like the law (Frechet distance of its pixels)."""
    truth, solver, grid = truths(400), tree.function("solvers", name), even(Preserving(), 50)
    known, calls = part(truth), []

    def counted(x: Tensor, n: Node) -> Prediction:
        calls[-1] += 1
        return denoise(x, n)

    ends = {}
    for t0 in (1.0, 0.2):
        rng = torch.Generator().manual_seed(3)
        calls.append(0)
        project = measured(part, known, rng)
        ends[t0] = ccdf(solver, counted, first(part, known), grid, t0, project, rng, Brownian((5,)))
    assert calls == [50, 10]
    full, late = (float((ends[t0] - truth).square().mean()) for t0 in (1.0, 0.2))
    assert late <= 1.01 * full
    law, guess = Moments.of(truth.flatten(1)), Moments.of(first(part, known).flatten(1))
    assert frechet(Moments.of(ends[0.2].flatten(1)), law) < 0.5 * frechet(guess, law)


@pytest.mark.system("ccdf")
@each_part
@pytest.mark.parametrize("path", [Flow(), Preserving()], ids=lambda v: type(v).__name__)
def test_an_error_of_the_guess_contracts_at_least_as_the_steps_do(
    path: Flow | Preserving, part: Callable[[Tensor], Tensor]
) -> None:
    """Theorem 1: with the same noise two guesses come nearer by alpha at t0 times every step's Lipschitz constant,
    which here is known; projections only help, and a later start forgets less."""
    one, other, grid = first(part, part(truths(4))), truths(4).flip(0), even(path, 20)
    known, ddim = part(truths(4)), tree.function("solvers", "ddim")

    def apart(t0: float, free: bool = False) -> float:
        ends = []
        for guess in (one, other):
            rng = torch.Generator().manual_seed(0)
            project = (lambda x, n: x) if free else measured(part, known, rng)
            ends.append(ccdf(ddim, denoise, guess, grid, t0, project, torch.Generator().manual_seed(9)))
        return float((ends[0] - ends[1]).norm() / (one - other).norm())

    shrunk = []
    for t0 in (0.2, 0.5):
        rest = tail(grid, t0)
        assert rest is not None
        bound = rest.nodes[0].alpha
        for now, after in rest.steps():
            gain = now.alpha * VALUES / (now.alpha**2 * VALUES + now.sigma**2)
            bound *= float((after.alpha * gain + after.sigma / now.sigma * (1 - now.alpha * gain)).max())
        assert apart(t0) <= apart(t0, free=True) <= bound < 1
        shrunk.append(apart(t0))
    assert shrunk[1] < shrunk[0]


def test_a_projection_of_ones_own_is_asked_before_every_call_and_at_the_end() -> None:
    asked: list[float] = []

    def clamp(x: Tensor, n: Node) -> Tensor:
        asked.append(n.t)
        return x.clamp(-1, 1)

    rng, ddim = torch.Generator().manual_seed(0), tree.function("solvers", "ddim")
    y = ccdf(ddim, denoise, truths(2), even(Flow(), 10), 0.3, clamp, rng)
    assert asked == pytest.approx([0.3, 0.2, 0.1, 0.0])
    assert float(y.abs().max()) <= 1
    x = noised(truths(2), even(Flow(), 10).nodes[7], torch.Generator().manual_seed(0))
    rest = even(Flow(), 10).since(7)
    assert torch.equal(y, solve(ddim, projected(denoise, clamp), x, rest).clamp(-1, 1))


def test_a_start_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="t0 is a time of the grid"):
        ccdf(tree.function("solvers", "ddim"), denoise, truths(1), even(Flow(), 4), 2.0, lambda x, n: x)
