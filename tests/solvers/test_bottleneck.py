"""Bottleneck sampling on pictures whose law is known at both sizes: resizing, switches, times and what comes out."""

from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.brownian import Brownian
from hasten.denoiser import Denoiser, Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.recipe import Recipe, RecipeError
from hasten.solvers.bottleneck import BASES, bottleneck, resized
from hasten.solvers.consistency import consistency
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve

pytestmark = pytest.mark.system("bottleneck-sampling")
SIDE = 8
PATHS = [Flow(), EDM(8.0), Preserving()]
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
K2 = torch.arange(SIDE, dtype=torch.float64)[:, None] ** 2 + torch.arange(SIDE, dtype=torch.float64) ** 2
SMOOTH = 10 / (1 + K2) ** 1.5
"""Variances of a law of pictures [SIDE, SIDE] that is independent in its cosine transform."""
CUT = SMOOTH * (torch.arange(SIDE)[:, None] < SIDE // 2) * (torch.arange(SIDE) < SIDE // 2)
"""The same without all that a picture of half its sides can't hold."""


def waves(side: int) -> Tensor:
    """The orthonormal cosine transform, [frequency, place], from its definition."""
    places = (torch.arange(side, dtype=torch.float64) + 0.5) * torch.pi / side
    rows = [torch.cos(k * places) for k in range(side)]
    return torch.stack([r / r.norm() for r in rows])


def by_frequency(x: Tensor, gains: Tensor) -> Tensor:
    c = waves(x.shape[-1])
    return c.T @ (gains * (c @ x @ c.T)) @ c


def at_size(var: Tensor, side: int) -> Tensor:
    """Variances of pictures of that law, cut to a smaller size."""
    return var[:side, :side] * (side / SIDE) ** 2


def mean(var: Tensor) -> Denoiser:
    """E[x0 | x] at either size."""

    def denoise(x: Tensor, n: Node) -> Prediction:
        v = at_size(var, x.shape[-1])
        x0 = by_frequency(x, v * n.alpha / (v * n.alpha**2 + n.sigma**2))
        return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)

    return denoise


def exact(var: Tensor, grid: Grid, first: int, last: int) -> Denoiser:
    """What makes every step of `ddim` go along the flow, so that a stage that starts in its law ends in it."""
    steps = {SIDE: list(grid.steps()), SIDE // 2: list(at_half(grid, first, last).steps())}

    def denoise(x: Tensor, n: Node) -> Prediction:
        v = at_size(var, x.shape[-1])
        _, m = min(steps[x.shape[-1]], key=lambda step: abs(step[0].t - n.t))
        r = ((v * m.alpha**2 + m.sigma**2) / (v * n.alpha**2 + n.sigma**2)).sqrt()
        d = n.alpha * m.sigma - n.sigma * m.alpha
        return Prediction(x, by_frequency(x, (m.sigma - n.sigma * r) / d), by_frequency(x, (n.alpha * r - m.alpha) / d))

    return denoise


def at_half(grid: Grid, first: int, last: int) -> Grid:
    assert grid.path is not None
    lams = torch.tensor([n.lam for n in grid.nodes[first : len(grid) + 1 - last]], dtype=torch.float64)
    return at(grid.path, grid.path.time(lams + log(2)).tolist())


def even(path: Path, steps: int) -> Grid:
    return at(path, [1 - i / steps for i in range(steps + 1)])


def covariances(solver: Solver, denoise: Denoiser, grid: Grid, var: Tensor) -> dict[Any, Tensor]:
    """Exact covariances, [pixels, pixels], of the states at every call, by its place, and of the sample, under "end",
    from the law at the grid's start: all is linear in the start and in the noises, so unit vectors of each tell it."""
    units, begin = torch.eye(SIDE**2, dtype=torch.float64).view(-1, 1, SIDE, SIDE), grid.nodes[0]
    start = by_frequency(units, (var * begin.alpha**2 + begin.sigma**2).sqrt())
    found: dict[Any, Tensor] = {}
    for source in range(3):
        places, draws = iter(range(1000)), iter(range(1, 1000))

        def noise(begin: float, stop: float, like: Tensor, source: int = source, draws: Any = draws) -> Tensor:
            return units if next(draws) == source else torch.zeros_like(like)

        def add(place: Any, x: Tensor) -> None:
            found[place] = found.get(place, 0) + x.flatten(1).T @ x.flatten(1)

        def asked(x: Tensor, n: Node, places: Any = places) -> Prediction:
            add(next(places), x)
            return denoise(x, n)

        add("end", solve(solver, asked, torch.zeros_like(start) if source else start, grid, noise))
    return found


def law(var: Tensor, n: Node) -> Tensor:
    """Covariance of alpha x0 + sigma eps."""
    c = torch.kron(waves(len(var)), waves(len(var)))
    return c.T @ torch.diag((n.alpha**2 * var + n.sigma**2).flatten()) @ c


def frechet(found: Tensor, var: Tensor) -> float:
    """Squared Frechet distance over the law's own variance; both have mean 0."""
    want = law(var, Node(0, 1, 0, 0, 0, 0))
    values, vectors = torch.linalg.eigh(want)
    root = vectors @ torch.diag(values.clamp(0).sqrt()) @ vectors.T
    both = torch.linalg.eigvalsh(root @ found @ root).clamp(0).sqrt().sum()
    return float((found.trace() + want.trace() - 2 * both) / want.trace())


@pytest.mark.parametrize(("size", "wanted"), [(8, 4), (9, 6), (6, 9), (8, 8)])
def test_resizing_keeps_frequencies_and_the_whiteness_of_noise(size: int, wanted: int) -> None:
    """Every cosine that both sizes hold becomes the same cosine, every other nothing, and white noise white noise of
    the deviation that is said, at sides that are no multiples of each other too."""
    for k in range(size):
        places = (torch.arange(n, dtype=torch.float64).add(0.5) / n for n in (size, wanted))
        here, there = (torch.cos(torch.pi * k * p).expand(2, 3, 5, -1) for p in places)
        want = there if k < wanted else torch.zeros_like(there)
        assert torch.allclose(resized(here, (5, wanted)), want, atol=1e-12)
        assert torch.allclose(resized(here.mT, (wanted, 5)), want.mT, atol=1e-12)
    units = torch.eye(size**2, dtype=torch.float64).view(-1, 1, size, size)
    spread = resized(units, (wanted, wanted)).flatten(1)
    if wanted <= size:
        assert torch.allclose(spread.T @ spread, torch.eye(wanted**2, dtype=torch.float64) * (wanted / size) ** 2)
    else:
        assert torch.allclose(resized(spread.view(-1, 1, wanted, wanted), (size, size)), units, atol=1e-12)


@each_path
@pytest.mark.parametrize("base", BASES)
def test_at_scale_1_it_is_the_base_bit_for_bit_and_draws_nothing(base: str, path: Path) -> None:
    def none(start: float, stop: float, like: Tensor) -> Tensor:
        raise AssertionError("noise was asked for")

    x, grid = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double(), even(path, 12)
    want = solve(BASES[base], mean(SMOOTH), x, grid)
    assert torch.equal(solve(bottleneck.given(base=base, scale=1.0), mean(SMOOTH), x, grid, none), want)
    few = bottleneck.given(base=base, first=7, last=5)  # and where no step is left for the smaller size
    assert torch.equal(solve(few, mean(SMOOTH), x, grid, none), want)
    assert not torch.allclose(solve(few.given(last=4), mean(SMOOTH), x, grid, Brownian([1])), want, atol=1e-3)


@each_path
def test_what_the_papers_noise_does_at_scale_1_is_a_step_of_consistency_at_either_switch(path: Path) -> None:
    x, grid = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double(), even(path, 9)
    zs = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1)).double()
    ours = bottleneck.given(scale=1.0, fresh=True, first=3, last=2)
    got = solve(ours, mean(SMOOTH), x, grid, lambda start, stop, like: zs[int(start)])
    stops = [(0, 2), (2, 3), (3, 6), (6, 7), (7, 9)]
    noises = iter(zs)
    for i, (a, b) in enumerate(stops):
        part = Grid(grid.nodes[a : b + 1], path)
        x = solve(
            consistency if i % 2 else BASES["ddim"], mean(SMOOTH), x, part, lambda start, stop, like: next(noises)
        )
    assert torch.allclose(got, x, atol=1e-12)


@each_path
def test_every_stage_starts_in_the_law_of_resized_pictures(path: Path) -> None:
    """With every step exact: the covariance at each call is alpha^2 that of the resized pictures + sigma^2, and where
    pictures have no frequencies beyond the small size, the sample's is the pictures' own."""
    grid, (first, last) = even(path, 9), (2, 4)
    ours, low = bottleneck.given(first=first, last=last), at_half(grid, first, last)
    for var in (SMOOTH, CUT):
        found = covariances(ours, exact(var, grid, first, last), grid, var)
        for i in range(9):
            small = first <= i < 9 - last
            n = low.nodes[i - first] if small else grid.nodes[i]
            want = law(at_size(var, SIDE // 2) if small else var if i < first else CUT, n)
            if i <= 9 - last or var is CUT:  # from where frequencies are missing on, the flow is not that of the law
                assert torch.allclose(found[i], want, atol=1e-9), i
        if var is CUT:
            assert torch.allclose(found["end"], law(CUT, grid.nodes[-1]), atol=1e-9)


@each_path
def test_with_the_papers_noise_a_stage_starts_at_the_right_noise_and_with_too_little_picture(path: Path) -> None:
    """alpha^2 the covariance of the resized prediction + sigma^2; what is missing is what the network does not know."""
    grid, (first, last) = even(path, 9), (2, 4)
    low = at_half(grid, first, last)
    found = covariances(bottleneck.given(first=first, last=last, fresh=True), mean(SMOOTH), grid, SMOOTH)
    for call, asked, after, size in ((1, grid.nodes[1], low.nodes[0], 4), (4, low.nodes[-2], grid.nodes[5], 8)):
        seen, side = found[call], round(found[call].shape[0] ** 0.5)
        units = torch.eye(side**2, dtype=torch.float64).view(-1, 1, side, side)
        x0 = resized(mean(SMOOTH)(units, asked).x0, (size, size)).flatten(1)
        white = after.sigma**2 * torch.eye(size**2, dtype=torch.float64)
        assert torch.allclose(found[call + 1], after.alpha**2 * x0.T @ seen @ x0 + white, atol=1e-9)
    missing = law(at_size(SMOOTH, 4), low.nodes[0]) - found[2]
    assert torch.linalg.eigvalsh(missing).min() > 0
    assert missing.trace() > 0.05 * low.nodes[0].alpha ** 2 * at_size(SMOOTH, 4).sum()


@each_path
@pytest.mark.parametrize("scale", [0.5, 0.75])
def test_it_asks_once_a_step_at_counted_sizes_and_shifted_times(path: Path, scale: float) -> None:
    """Between, sigma / alpha is the grid's times `scale`. Where sides are rounded down, noise is added both ways."""
    asked: list[tuple[Any, Node]] = []

    def note(x: Tensor, n: Node) -> Prediction:
        asked.append((tuple(x.shape), n))
        return Prediction(x, x, x)

    grid = even(path, 10)
    spans: list[tuple[float, float, Any]] = []

    def noise(start: float, stop: float, like: Tensor) -> Tensor:
        spans.append((start, stop, tuple(like.shape)))
        return like

    got = solve(bottleneck.given(scale=scale), note, torch.ones(2, 3, 8, 12), grid, noise)
    small = (2, 3, *({0.5: (4, 6), 0.75: (6, 8)}[scale]))
    assert got.shape == (2, 3, 8, 12)
    assert [shape for shape, _ in asked] == [(2, 3, 8, 12)] * 2 + [small] * 4 + [(2, 3, 8, 12)] * 4
    for i, (_, n) in enumerate(asked):
        shift = log(scale) if 2 <= i < 6 else 0
        assert n.lam == pytest.approx(grid.nodes[i].lam - shift, abs=1e-9)
    assert spans == [(0.0, 1.0, (2, 3, 8, 12))] * (scale == 0.75) + [(1.0, 2.0, (2, 3, 8, 12))]


@each_path
@pytest.mark.parametrize(("scale", "side"), [(0.6, 4), (0.65, 6), (0.3, 2)])
@pytest.mark.parametrize("fresh", [False, True])
def test_noise_is_that_of_the_times_whatever_side_is_rounded_to(
    path: Path, scale: float, side: int, fresh: bool
) -> None:
    """Of a picture that is known, the covariance at every call is sigma^2 alone."""
    none, grid = torch.zeros(SIDE, SIDE, dtype=torch.float64), even(path, 9)
    found = covariances(bottleneck.given(scale=scale, fresh=fresh), mean(none), grid, none)
    for i in range(9):
        lam = torch.tensor(grid.nodes[i].lam - (log(scale) if i in (2, 3, 4) else 0), dtype=torch.float64)
        sigma = at(path, [*path.time(lam[None]).tolist(), 0.0]).nodes[0].sigma
        pixels = side**2 if i in (2, 3, 4) else SIDE**2
        assert torch.allclose(found[i], sigma**2 * torch.eye(pixels, dtype=torch.float64), atol=1e-9), i


def test_sides_are_multiples_and_frames_of_videos_are_resized_alike() -> None:
    shapes: list[Any] = []

    def note(x: Tensor, n: Node) -> Prediction:
        shapes.append(tuple(x.shape[2:]))
        return Prediction(x, x, x)

    def asked(shape: tuple[int, ...], **settings: Any) -> Any:
        shapes.clear()
        solve(bottleneck.given(**settings), note, torch.zeros(1, 2, *shape), even(Flow(), 9), Brownian([0]))
        return shapes[3]

    assert asked((16, 24), multiple=8) == (8, 16)
    assert asked((6, 10), multiple=1) == (3, 5)
    assert asked((16, 24), scale=0.25, multiple=16) == (16, 16)
    assert asked((2, 2)) == (2, 2)
    assert asked((6, 10), multiple=8) == (6, 8)
    assert asked((3, 16, 24)) == (3, 8, 12)
    frames = torch.randn(1, 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(1)).double()
    got = solve(bottleneck, mean(SMOOTH), frames, even(Flow(), 9), lambda start, stop, like: noise)
    for i in range(3):
        one = solve(bottleneck, mean(SMOOTH), frames[:, :, i], even(Flow(), 9), lambda *_, i=i: noise[:, :, i])
        assert torch.allclose(got[:, :, i], one, atol=1e-12)


STEPS: list[tuple[int, int, float, float]] = [(5, 7, 4 / 7, 0.001), (2, 4, 23 / 56, 0.004)]


@pytest.mark.parametrize(("first", "last", "share", "bound"), STEPS)
@pytest.mark.parametrize("base", ["ddim", "dpmpp_2m"])
def test_token_steps_fall_as_counted_and_the_distance_stays_near_the_bases(
    base: str, first: int, last: int, share: float, bound: float
) -> None:
    """Of 28 steps, with the true denoiser at both sizes; in variances of the law. The paper's noise is further off."""
    grid = at(Flow(), [3 * t / (1 + 2 * t) for t in (1 - i / 28 for i in range(29))])
    ours = bottleneck.given(base=base, first=first, last=last)
    tokens = [0]

    def counted(x: Tensor, n: Node) -> Prediction:
        tokens[0] += x.shape[-1] * x.shape[-2]
        return mean(SMOOTH)(x, n)

    solve(ours, counted, torch.zeros(1, 1, SIDE, SIDE).double(), grid, Brownian([0]))
    assert tokens[0] == share * 28 * SIDE**2
    plain = frechet(covariances(BASES[base], mean(SMOOTH), grid, SMOOTH)["end"], SMOOTH)
    near, far = (
        frechet(covariances(ours.given(fresh=fresh), mean(SMOOTH), grid, SMOOTH)["end"], SMOOTH)
        for fresh in (False, True)
    )
    assert near < plain + bound
    assert far > near + 0.006


def test_what_it_cannot_do_is_said_in_a_line() -> None:
    x, grid = torch.zeros(1, 16, 4), even(Flow(), 9)
    with pytest.raises(ValueError, match=r"of a state of \[1, 16, 4\] it knows no rows and columns: take another"):
        solve(bottleneck, mean(SMOOTH), x, grid, Brownian([0]))
    with pytest.raises(ValueError, match="bottleneck adds noise"):
        solve(bottleneck, mean(SMOOTH), torch.zeros(1, 1, 8, 8), grid)
    with pytest.raises(ValueError, match=r"make the grid with grid.at"):
        solve(bottleneck, mean(SMOOTH), torch.zeros(1, 1, 8, 8).double(), Grid(grid.nodes), Brownian([0]))
    with pytest.raises(RecipeError, match="scale"):
        Recipe.from_dict({"solver": {"bottleneck": {"scale": 1.5}}})
