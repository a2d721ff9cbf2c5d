"""Paths, grids and readings: the identities that every solver stands on."""

from __future__ import annotations

import math
from copy import copy

import pytest
import torch
from torch import Tensor

from hasten import tree
from hasten.denoiser import Prediction, Target, denoiser, on_path, said
from hasten.grid import Grid, Node, at, build
from hasten.path import Path, lam
from hasten.paths import discrete
from hasten.paths.cosine import Cosine
from hasten.paths.edm import EDM
from hasten.paths.exploding import Exploding
from hasten.paths.flow import Flow
from hasten.paths.gvp import GVP
from hasten.paths.interpolant import Interpolant
from hasten.paths.learned import Rising
from hasten.paths.log_snr import LogSNR
from hasten.paths.preserving import Preserving
from hasten.paths.shifted import Shifted
from hasten.paths.sub_preserving import SubPreserving
from hasten.paths.tabulated import Tabulated
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve

PATHS: dict[str, Path] = {
    "flow": Flow(),
    "edm": EDM(),
    "exploding": Exploding(),
    "preserving": Preserving(),
    "sub-preserving": SubPreserving(),
    "cosine": Cosine(),
    "gvp": GVP(),
    "tabulated": discrete.scaled_linear(),
    "tabulated to pure noise": discrete.to_pure_noise(discrete.scaled_linear()),
    "shifted flow": Shifted(Flow(), 3.0),
    "shifted preserving": Shifted(Preserving(), 0.5),
    "interpolant": Interpolant(lambda t: 1 - t, lambda t: torch.sqrt(2 * t * (1 - t) + t**2)),
}
NOISY_END: dict[str, Path] = {
    "log snr": LogSNR(),
    "log snr, bent": LogSNR(-9.0, 6.0, lambda t: t**2 * (3 - 2 * t) * 0.9 + 0.1 * t),
    "log snr, learned": LogSNR(-10.0, 4.0, Rising(8, torch.Generator().manual_seed(0)).fixed()),
}
INSIDE = torch.cat(
    [torch.logspace(-3, -1, 9, dtype=torch.float64), torch.linspace(0.11, 0.99, 40, dtype=torch.float64)]
)
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
every_path = pytest.mark.parametrize("path", (PATHS | NOISY_END).values(), ids=PATHS | NOISY_END)


@every_path
def test_time_inverts_lam(path: Path) -> None:
    assert (path.time(lam(path, INSIDE)) - INSIDE).abs().max() < 1e-10


@every_path
def test_time_inverts_lam_in_float32(path: Path) -> None:
    t = INSIDE.float()
    assert (path.time(lam(path, t)) - t).abs().max() < 2e-4


@each_path
def test_lam_falls_and_noise_grows(path: Path) -> None:
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert (path.sigma(t).diff() > 0).all()
    assert (path.alpha(t).diff() <= 0).all()
    assert (lam(path, t[1:-1]).diff() < 0).all()
    assert path.sigma(t[:1]).item() == 0
    assert path.alpha(t[:1]).item() == 1


PRESERVING = ("preserving", "cosine", "gvp", "tabulated", "tabulated to pure noise", "shifted preserving", *NOISY_END)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_is_preserved(name: str) -> None:
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    path = (PATHS | NOISY_END)[name]
    assert (path.alpha(t) ** 2 + path.sigma(t) ** 2 - 1).abs().max() < 1e-14


def test_each_path_is_what_it_says() -> None:
    t = INSIDE
    assert torch.equal(Flow().alpha(t) + Flow().sigma(t), torch.ones_like(t))
    assert torch.equal(EDM(7.0).sigma(t), 7 * t)
    # beta(t) = b0 + t (b1 - b0), and alpha' = -beta alpha / 2: the SDE that the closed form solves
    path, h = Preserving(), 1e-5
    slope = (path.alpha(t + h) - path.alpha(t - h)) / (2 * h)
    beta = path.beta_min + t * (path.beta_max - path.beta_min)
    assert (slope + beta / 2 * path.alpha(t)).abs().max() < 1e-7


def test_a_table_is_met_at_its_steps_and_bad_ones_are_refused() -> None:
    bar = discrete.scaled_linear().alpha_bar
    t = torch.tensor([(i + 1) / 1000 for i in (0, 499, 999)], dtype=torch.float64)
    want = torch.tensor([bar[i] for i in (0, 499, 999)], dtype=torch.float64)
    assert (Tabulated(bar).alpha(t) ** 2 - want).abs().max() < 1e-14
    assert PATHS["tabulated to pure noise"].alpha(torch.tensor(1.0, dtype=torch.float64)) < 1.1e-6
    for bad in ((0.5, 0.6), (1.0, 0.5), (0.5, 0.5), (float("nan"), 0.5)):
        with pytest.raises(ValueError, match="must fall"):
            Tabulated(bad)


@each_path
def test_ends(path: Path) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert lam(path, zero) == math.inf
    assert path.time(torch.tensor(math.inf)) == 0
    if path in (Flow(), GVP(), Cosine(), PATHS["shifted flow"], PATHS["interpolant"]):
        assert lam(path, zero + 1) == -math.inf
        assert path.time(torch.tensor(-math.inf)) == 1


@every_path
def test_a_path_is_a_value_that_may_key_a_cache(path: Path) -> None:
    assert {path: 1}[copy(path)] == 1


@every_path
def test_slopes_of_a_grid_against_finite_differences(path: Path) -> None:
    times, h = [0.9503, 0.7004, 0.4106, 0.2005, 0.0504], 1e-6  # between the table's steps, where it has a slope
    t = torch.tensor(times, dtype=torch.float64)
    for part, name in ((path.alpha, "dalpha"), (path.sigma, "dsigma")):
        want = (part(t + h) - part(t - h)) / (2 * h)
        got = torch.tensor([getattr(n, name) for n in at(path, times).nodes], dtype=torch.float64)
        assert (got - want).abs().max() < 1e-6 * want.abs().max().clamp_min(1)


@each_path
def test_nodes_hold_what_the_path_says(path: Path) -> None:
    for n in at(path, [0.8, 0.3, 0.0]).nodes:
        t = torch.tensor(n.t, dtype=torch.float64)
        assert (n.alpha, n.sigma) == (path.alpha(t).item(), path.sigma(t).item())
        assert n.clean == (n.t == 0)
        assert n.lam == math.inf if n.clean else abs(n.lam - lam(path, t).item()) < 1e-12


def test_a_grid_is_laid_where_gradients_are_off() -> None:
    """Pipelines run under no_grad and inference_mode; slopes come from autograd all the same."""
    want = at(Preserving(), [1.0, 0.5, 0.1])
    with torch.no_grad():
        assert at(Preserving(), [1.0, 0.5, 0.1]) == want
    with torch.inference_mode():
        assert at(Preserving(), [1.0, 0.5, 0.1]) == want


@every_path
def test_no_part_of_a_node_is_nan(path: Path) -> None:
    """At the clean end sigma may rise like a root, with infinite slope; that is a number, NaN is none."""
    for n in at(path, [1.0, 0.5, 0.0]).nodes:
        assert not any(math.isnan(v) for v in (n.t, n.alpha, n.sigma, n.lam, n.dalpha, n.dsigma)), n


@pytest.mark.parametrize("times", [[], [1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.4]])
def test_times_must_fall(times: list[float]) -> None:
    with pytest.raises(ValueError, match="falling times"):
        at(Flow(), times)


@pytest.mark.parametrize("times", [[1.1, 0.0], [1.0, -0.1], [999.0, 0.0], [1.0, float("nan"), 0.0]])
def test_times_lie_between_0_and_1(times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        at(Flow(), times)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_grid_has_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps must be 1 or more, got {steps}"):
        build(Flow(), tree.function("grids", "uniform"), steps)


def test_parts_of_a_grid() -> None:
    grid = at(Flow(), [1.0, 0.6, 0.3, 0.0])
    assert len(grid) == 3
    assert [(a.t, b.t) for a, b in grid.steps()] == [(1.0, 0.6), (0.6, 0.3), (0.3, 0.0)]
    assert grid.since(1) == Grid(grid.nodes[1:])
    with pytest.raises(ValueError, match="two or more"):
        grid.since(3)


@pytest.mark.parametrize("name", tree.functions("grids"))
@every_path
def test_every_spacing_falls_from_noise_to_clean(path: Path, name: str) -> None:
    for steps in (1, 2, 3, 4, 7, 28, 100):
        grid = build(path, tree.function("grids", name), steps)
        assert len(grid) == steps
        assert (grid.nodes[0].t, grid.nodes[-1].t) == (1.0, 0.0)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shifted_is_a_constant_in_log_snr(shift: float) -> None:
    """Esser et al. 2024: on the straight path, t -> s t / (1 + (s - 1) t) takes log s from lam. Shift 1 is uniform."""
    even, moved = (build(Flow(), tree.function("grids", "shifted"), 9, shift=s).nodes[1:-1] for s in (1.0, shift))
    for a, b in zip(even, moved, strict=True):
        assert abs(b.lam - (a.lam - math.log(shift))) < 1e-12
    assert build(Flow(), tree.function("grids", "uniform"), 9).nodes[1:-1] == even


def test_spacings_are_even_in_what_they_name() -> None:
    lams = [n.lam for n in build(Flow(), tree.function("grids", "log_snr"), 12, low=-2.0, high=4.0).nodes[1:-1]]
    assert torch.tensor(lams, dtype=torch.float64).diff(n=2).abs().max() < 1e-10
    assert (round(lams[0], 9), round(lams[-1], 9)) == (-2.0, 4.0)
    nodes = build(EDM(30.0), tree.function("grids", "karras"), 12, rho=7.0, smallest=0.05).nodes[:-1]
    roots = torch.tensor([(n.sigma / n.alpha) ** (1 / 7.0) for n in nodes], dtype=torch.float64)
    assert roots.diff(n=2).abs().max() < 1e-10
    assert abs(nodes[-1].sigma / nodes[-1].alpha - 0.05) < 1e-12


def outputs(x0: Tensor, eps: Tensor, n: Node) -> dict[Target, Tensor]:
    """What a perfect network of each target says, from the targets' own definitions."""
    a, s = n.alpha, n.sigma
    return {"x0": x0, "eps": eps, "score": -eps / s, "v": a * eps - s * x0, "flow": eps - x0}


@pytest.mark.parametrize("t", [0.99, 0.6, 0.05])
@pytest.mark.parametrize("path", [Flow(), EDM(5.0), Preserving()], ids=lambda p: type(p).__name__)
def test_all_targets_read_alike(path: Path, t: float) -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n = at(path, [t, 0.0]).nodes[0]
    x = n.alpha * x0 + n.sigma * eps
    for target, out in outputs(x0, eps, n).items():
        p = Prediction.of(target, out, x, n)
        assert (p.x0 - x0).abs().max() < 1e-10, target
        assert (p.eps - eps).abs().max() < 1e-10, target
        assert torch.equal(p.x, x)


@pytest.mark.parametrize("t", [0.99, 0.6, 0.05])
@every_path
def test_every_target_turns_into_every_other_and_back(path: Path, t: float) -> None:
    """What a perfect network of each target says, by the targets' definitions; read, said as any other, read again."""
    x0, eps = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (n, _) = at(path, [t, 0.0]).nodes
    x = n.alpha * x0 + n.sigma * eps
    for target, out in outputs(x0, eps, n).items():
        read = Prediction.of(target, out, x, n)
        for other, want in outputs(x0, eps, n).items():
            told = said(other, read, n)
            scale = 1e-12 * max(1, n.sigma / n.alpha, n.alpha / n.sigma) ** 2
            assert (told - want).abs().max() < scale * max(1, float(want.abs().max())), (target, other)
            back = said(target, Prediction.of(other, told, x, n), n)
            assert (back - out).abs().max() < scale * max(1, float(out.abs().max())), (target, other)


@pytest.mark.parametrize("target", ["x0", "eps", "v", "flow", "score"])
def test_a_reading_keeps_to_the_state(target: Target) -> None:
    """Whatever the network says, x = alpha x0 + sigma eps: a reading never contradicts its state."""
    n = at(Flow(), [0.37, 0.0]).nodes[0]
    x, out = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = Prediction.of(target, out, x, n)
    assert (n.alpha * p.x0 + n.sigma * p.eps - x).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("target", "t"), [("v", 1.0), ("flow", 1.0), ("x0", 1.0), ("v", 0.0), ("flow", 0.0), ("eps", 0.0)]
)
def test_readings_are_finite_where_they_are_said_to_be(target: Target, t: float) -> None:
    n = next(n for n in at(Flow(), [1.0, 0.0]).nodes if n.t == t)
    x, out = torch.randn(2, 8)
    p = Prediction.of(target, out, x, n)
    assert p.x0.isfinite().all()
    assert p.eps.isfinite().all()


def test_an_unknown_target_is_named() -> None:
    n = at(Flow(), [0.5, 0.0]).nodes[0]
    known = "unknown target 'epsilon'; known: x0, eps, v, flow, score"
    with pytest.raises(ValueError, match=known):
        Prediction.of("epsilon", torch.zeros(1), torch.zeros(1), n)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=known):
        said("epsilon", Prediction(*torch.zeros(3, 1)), n)  # type: ignore[arg-type]


def test_a_network_is_told_the_time_of_each_row() -> None:
    told: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return x

    x = torch.randn(3, 2, 2)
    p = denoiser(network, "eps")(x, at(Flow(), [0.25, 0.0]).nodes[0])
    assert torch.equal(told[0], torch.full((3,), 0.25))
    assert torch.equal(p.eps, x)


SAME_LAM = ("flow", "edm", "exploding", "preserving", "cosine", "gvp", "shifted flow", "interpolant", "log snr")


def sampled(name: str, path: Path, steps: int) -> Tensor:
    """A network that was trained on flow velocities of Flow(), sampled on another path at even lam from -2 to 3.5."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        n = at(Flow(), [float(t[0]), 0.0]).nodes[0]
        return said("flow", Mixture().denoise(x, n), n)

    grid = at(path, path.time(torch.linspace(-2, 3.5, steps + 1, dtype=torch.float64)).tolist())
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None] * math.hypot(1, math.exp(2))
    denoise = on_path(denoiser(network, "flow"), Flow())
    return solve(tree.function("solvers", name), denoise, x * grid.nodes[0].alpha, grid) / grid.nodes[-1].alpha


@pytest.mark.parametrize("other", SAME_LAM[1:])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_the_path_may_change_at_sampling_time(solver: str, other: str) -> None:
    """These solvers work in lam, so at the same lam the same network gives the same sample on any path. Karras et al.
    2022, arXiv:2206.00364 sec. 3."""
    want, got = (sampled(solver, (PATHS | NOISY_END)[p], 12) for p in ("flow", other))
    assert (got - want).abs().max() < 1e-9


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_in_time_differ_between_paths_by_their_own_order(solver: str, order: int) -> None:
    """Paths that are curved in (alpha, sigma): on straight ones, such as EDM, Euler's method is DDIM."""
    for other in ("preserving", "cosine"):
        gaps = [(sampled(solver, Flow(), n) - sampled(solver, PATHS[other], n)).abs().max() for n in (50, 100)]
        assert gaps[0] > 1e-5
        assert abs(float(torch.log2(gaps[0] / gaps[1])) - order) < 0.15, other


def test_a_lam_that_the_trained_path_does_not_reach_is_refused() -> None:
    for trained in (EDM(5.0), NOISY_END["log snr, bent"]):
        denoise = on_path(lambda x, n: Prediction(x, x, x), trained)
        with pytest.raises(ValueError, match="outside the path that the network was trained on"):
            denoise(torch.zeros(1), at(Flow(), [0.999, 0.0]).nodes[0])


@pytest.mark.parametrize("path", NOISY_END.values(), ids=NOISY_END)
def test_a_path_with_noise_at_its_end_is_sampled_to_that_end(path: Path) -> None:
    """sigma(0) > 0: no node is clean, the last step is like any other, and where the flow goes the sample goes."""
    law, x = Gaussian(), torch.tensor([-1.3, 0.2, 2.1], dtype=torch.float64)
    for name, steps in (("ddim", 800), ("heun", 100), ("dpmpp_2m", 100), ("unipc", 100)):
        grid = build(path, tree.function("grids", "log_snr"), steps, low=-8.0, high=8.0)
        assert not grid.nodes[-1].clean
        got = solve(tree.function("solvers", name), law.denoise, x, grid)
        assert (got - law.flow(x, grid.nodes[0], grid.nodes[-1])).abs().max() < 0.005, name


@pytest.mark.parametrize("name", ["log_snr", "karras", "exponential", "ays", "gits", "dm_nonuniform"])
def test_grids_in_lam_stop_at_the_end_of_a_noisy_path(name: str) -> None:
    """lam = 2 at t = 0, below where these grids go by themselves: their last knot is that end, and they stay inside."""
    path = LogSNR(-4.0, 8.0)
    grid = build(path, tree.function("grids", name), 8)
    lams = torch.tensor([n.lam for n in grid.nodes], dtype=torch.float64)
    assert (lams[0], lams[-1]) == (-4.0, 2.0)
    assert lams.diff().min() > 0.05
    if name == "exponential":
        assert lams[1:].diff(n=2).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["log_snr", "karras", "exponential", "ays", "gits", "dm_nonuniform"])
def test_a_path_that_a_grid_has_no_place_on_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="give the grid other ends"):
        build(EDM(1e-4), tree.function("grids", name), 8)
