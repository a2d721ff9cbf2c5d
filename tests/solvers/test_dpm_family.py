"""DPM-Solver, DPM-Solver++ and UniPC: beside diffusers, beside the papers' lines, and on laws that are known."""

from __future__ import annotations

from math import exp, expm1
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exact import distance, flown, slope, spaced
from hasten import tree
from hasten.bridge.process import process
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.path import Path
from hasten.paths.edm import EDM
from hasten.paths.flow import Flow
from hasten.paths.preserving import Preserving
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.declare import Solver
from hasten.solvers.drive import solve, visited
from hasten.solvers.exponential import moments, weights

LAW = Mixture()
X = torch.linspace(-2, 2, 9, dtype=torch.float64)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def named(name: str, **settings: Any) -> Solver:
    return tree.function("solvers", name).given(**settings)


def stepped(peer: Any, law: Any, x: Tensor, grid: Grid, orders: list[int] | None = None) -> Tensor:
    """diffusers' scheduler, stepped by hand along `grid`: asked for eps at its nodes, its sigmas set to theirs."""
    peer.set_timesteps(len(grid))
    peer.sigmas = torch.tensor([n.sigma / n.alpha for n in grid.nodes], dtype=torch.float64)
    peer.order_list = orders
    for t, node in zip(peer.timesteps, grid.nodes, strict=False):
        x = peer.step(law.denoise(x, node).eps, t, x).prev_sample
    return x


def shaped(x: Tensor) -> Tensor:
    """[B, C, H, W], as diffusers' UniPC wants it."""
    return x[:, None, None, None]


@pytest.mark.system("dpm-solver-pp", "unipc")
@pytest.mark.parametrize("steps", [5, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_equals_diffusers_to_a_clean_end(order: int, steps: int) -> None:
    """On its own integer times, in float32: 2M, and UniPC with the orders that fall before the end."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    own = {**BETAS, "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
    pairs = [(UniPCMultistepScheduler(**own, solver_order=order), named("unipc", order=order))]
    if order == 2:
        pairs.append((DPMSolverMultistepScheduler(**own), named("dpmpp_2m")))
    for peer, ours in pairs:
        peer.set_timesteps(steps)
        known = process(peer)
        grid = at(known.path, [known.told.t(t) for t in peer.timesteps.tolist()] + [0.0])
        x = theirs = shaped(X.float())
        for t, node in zip(peer.timesteps, grid.nodes, strict=False):
            theirs = peer.step(LAW.denoise(theirs, node).eps, t, theirs).prev_sample
        assert (solve(ours, LAW.denoise, x, grid) - theirs).abs().max() < 1e-5


@pytest.mark.system("unipc")
@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_unipc_equals_diffusers_of_any_order(order: int, variant: Any, corrector: bool) -> None:
    """Before a clean end: there diffusers' bh1 multiplies B(h) = -inf by zero, and all is NaN."""
    from diffusers import UniPCMultistepScheduler

    peer = UniPCMultistepScheduler(
        **BETAS, solver_order=order, solver_type=variant, lower_order_final=False, final_sigmas_type="sigma_min",
        disable_corrector=[] if corrector else list(range(9)),
    )  # fmt: skip
    grid, x = spaced(Preserving(), 9, "lam", -2, 2), shaped(X)
    ours = solve(named("unipc", order=order, variant=variant, corrector=corrector), LAW.denoise, x, grid)
    assert (ours - stepped(peer, LAW, x, grid)).abs().max() < 1e-12


@pytest.mark.system("dpm-solver", "dpm-solver-pp")
@pytest.mark.parametrize(
    ("name", "order", "kind"),
    [("dpm_solver", 1, "dpmsolver"), ("dpm_solver", 2, "dpmsolver"), ("dpmpp_2s", 2, "dpmsolver++")],
)
def test_singlestep_equals_diffusers(name: str, order: int, kind: str) -> None:
    """Its inner calls are at nodes of the grid: evenly inside our steps."""
    ours = named(name, order=order) if name == "dpm_solver" else named(name)
    inner, outer = nested(5, order)
    theirs = stepped(single(order, kind), LAW, shaped(X), inner, [*range(1, order + 1)] * 5)
    assert (solve(ours, LAW.denoise, shaped(X), outer) - theirs).abs().max() < 1e-12


def nested(steps: int, calls: int) -> tuple[Grid, Grid]:
    fine = spaced(Preserving(), steps * calls, "lam", -2, 2)
    return fine, Grid(fine.nodes[::calls], fine.path)


def single(order: int, kind: str) -> Any:
    from diffusers import DPMSolverSinglestepScheduler

    return DPMSolverSinglestepScheduler(
        **BETAS, solver_order=order, algorithm_type=kind, lower_order_final=False, final_sigmas_type="sigma_min"
    )


@pytest.mark.system("dpm-solver")
def test_order_three_in_one_step_is_the_papers_and_closer_than_diffusers() -> None:
    """Its second stage: the paper's alg. 2 adds sigma r2 / r1 ((e^(r2 h) - 1) / (r2 h) - 1) D1 there, diffusers (as for
    a whole step of order two) sigma (e^(r2 h) - 1) r2 / (2 r1) D1. Both are of third order; the law says who is
    nearer."""

    def paper(x: Tensor, now: Node, after: Node, path: Path) -> Tensor:
        h, r1, r2 = after.lam - now.lam, 1 / 3, 2 / 3
        s1, s2 = (
            at(path, [now.t, float(path.time(torch.tensor(now.lam + r * h, dtype=X.dtype)))]).nodes[1] for r in (r1, r2)
        )
        eps = LAW.denoise(x, now).eps
        u1 = s1.alpha / now.alpha * x - s1.sigma * (exp(r1 * h) - 1) * eps
        d1 = LAW.denoise(u1, s1).eps - eps
        u2 = s2.alpha / now.alpha * x - s2.sigma * (exp(r2 * h) - 1) * eps
        u2 -= s2.sigma * r2 / r1 * ((exp(r2 * h) - 1) / (r2 * h) - 1) * d1
        d2 = LAW.denoise(u2, s2).eps - eps
        x = after.alpha / now.alpha * x - after.sigma * (exp(h) - 1) * eps
        return x - after.sigma / r2 * ((exp(h) - 1) / h - 1) * d2

    for steps in (3, 5, 10, 20):
        inner, outer = nested(steps, 3)
        ours = solve(named("dpm_solver", order=3), LAW.denoise, X, outer)
        lines, path = X, Preserving()
        for now, after in outer.steps():
            lines = paper(lines, now, after, path)
        assert (ours - lines).abs().max() < 1e-12
        theirs = stepped(single(3, "dpmsolver"), LAW, shaped(X), inner, [1, 2, 3] * steps).flatten()
        truth = flown(LAW, X, inner.nodes[0], inner.nodes[-1])
        assert distance(ours, truth) < 0.65 * distance(theirs, truth)


@pytest.mark.system("dpm-solver-pp")
def test_3m_is_of_third_order_where_diffusers_is_of_second() -> None:
    """diffusers, after the authors' code: D2 = (D1_0 - D1_1) / (r0 + r1) is h^2 times the second divided difference,
    so h^2 x0'' / 2, but is multiplied by the integral of s^2 / 2 in place of s^2: half of the term is missing. And its
    first step stays DDIM's."""
    from diffusers import DPMSolverMultistepScheduler

    def errors(steps: int) -> tuple[float, float]:
        grid = spaced(Preserving(), steps, "lam", -1, 1)
        own = {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
        theirs = stepped(DPMSolverMultistepScheduler(**BETAS, **own), LAW, shaped(X), grid).flatten()
        truth = flown(LAW, X, grid.nodes[0], grid.nodes[-1])
        return distance(solve(named("dpmpp_3m"), LAW.denoise, X, grid), truth), distance(theirs, truth)

    for steps in (8, 16, 32):
        ours, theirs = errors(steps)
        assert ours < 0.75 * theirs
    assert slope(lambda steps: errors(steps)[0]) == pytest.approx(3, abs=0.15)
    assert slope(lambda steps: errors(steps)[1]) < 2.5


def test_3m_keeps_its_order_until_two_steps_before_a_clean_end() -> None:
    """The same grid with and without its end: what is asked differs from the last but one on, which a step of second
    order reaches."""
    asked: list[Tensor] = []

    def noted(x: Tensor, n: Node) -> Prediction:
        asked.append(x)
        return LAW.denoise(x, n)

    clean = at(Flow(), [0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.0])
    solve(named("dpmpp_3m"), noted, X, clean)
    ended = [*asked]
    solve(named("dpmpp_3m"), noted, X, Grid(clean.nodes[:-1], clean.path))
    assert all(torch.equal(a, b) for a, b in zip(ended[:5], asked[6:], strict=True))
    then, now, after = clean.nodes[3:6]
    seen = [LAW.denoise(x, n).x0 for x, n in zip(ended[3:5], (then, now), strict=True)]
    a, b = weights(now, after, [now, then])
    assert (ended[5] - (after.sigma / now.sigma * ended[4] + a * seen[1] + b * seen[0])).abs().max() < 1e-14


@pytest.mark.parametrize("h", [1e-6, 0.02, 0.3, 0.99, 1.0, 4.0, -0.3, -1.0, -5.0])
def test_moments_are_the_integrals(h: float) -> None:
    points, shares = np.polynomial.legendre.leggauss(60)
    v, shares = (points + 1) / 2, shares / 2
    for most in (1, 2, 6):
        want = [h * float((shares * np.exp(-h * (1 - v)) * v**n).sum()) for n in range(most + 1)]
        assert moments(h, most) == pytest.approx(want, rel=1e-11)


def test_weights_are_exact_on_polynomials_at_uneven_nodes() -> None:
    """x0 a polynomial in lam, whatever x: the exact solution by quadrature."""
    path = Flow()
    lams = torch.tensor([-1.3, -0.2, 0.1, 0.75, 1.0], dtype=torch.float64)
    *before, now, after = at(path, path.time(lams).tolist()).nodes
    points, shares = np.polynomial.legendre.leggauss(40)
    h = after.lam - now.lam
    lam, shares = now.lam + (points + 1) / 2 * h, shares * h / 2
    for through in ([now], [now, *before], [now, *before[1:], after]):
        for degree in range(len(through)):
            exact = after.alpha * float((shares * np.exp(lam - after.lam) * lam**degree).sum())
            got = sum(w * n.lam**degree for w, n in zip(weights(now, after, through), through, strict=True))
            assert got == pytest.approx(exact, rel=1e-10)


@pytest.mark.system("unipc")
@pytest.mark.parametrize(("corrector", "held"), [(True, 3), (False, 2)])
@pytest.mark.parametrize("path", [Flow(), EDM(5.0)], ids=["flow", "edm"])
def test_the_first_of_even_steps_holds_unipc_back(path: Path, corrector: bool, held: int) -> None:
    """What its docstring says of even grids; on grids that start small the order test finds order + 1."""

    def error(steps: int) -> float:
        grid = spaced(path, steps, "lam", -1.6, 2)
        unipc = named("unipc", order=5, variant="bh1", corrector=corrector)
        return distance(solve(unipc, LAW.denoise, X, grid), flown(LAW, X, grid.nodes[0], grid.nodes[-1]))

    assert slope(error) == pytest.approx(held, abs=0.15)


FAMILY = [
    *(named("dpm_solver", order=k) for k in (1, 2, 3)), named("dpmpp_2s"), named("dpmpp_2m"), named("dpmpp_3m"),
    *(named("unipc", order=k) for k in (1, 2, 3)),
]  # fmt: skip


def told(s: Solver) -> str:
    return "-".join([s.name, *(f"{k}{v}" for k, v in s.settings.items())])


@pytest.mark.system("dpm-solver", "dpm-solver-pp", "unipc")
@pytest.mark.parametrize("solver", FAMILY, ids=told)
@pytest.mark.parametrize("start", [1.0, 0.7])
def test_calls_are_as_claimed_with_one_in_the_last_step(solver: Solver, start: float) -> None:
    """Also from pure noise: a pipeline that starts in the middle counts steps of equal calls."""
    grid = at(Flow(), [start * t for t in (1, 0.7, 0.5, 0.2, 0)])
    assert len(visited(solver, grid)) == 3 * solver.calls + 1


@pytest.mark.parametrize("solver", [s for s in FAMILY if s.settings.get("order", 1) <= s.calls], ids=told)
def test_a_step_from_noise_to_clean_is_what_the_network_says(solver: Solver) -> None:
    grid = at(Flow(), [1.0, 0.0])
    assert torch.equal(solve(solver, LAW.denoise, X, grid), LAW.denoise(X, grid.nodes[0]).x0)


@pytest.mark.parametrize(
    ("solver", "order"),
    [(named("dpm_solver", order=k), k) for k in (1, 2, 3)]
    + [(named("dpm_solver", order=3, r1=0.5), 3), (named("dpmpp_2s"), 2), (named("dpmpp_2s", r1=0.4), 2)]
    + [(named("dpmpp_3m"), 2)],
    ids=lambda v: told(v) if isinstance(v, Solver) else "",
)
def test_a_step_from_pure_noise_keeps_the_order(solver: Solver, order: int) -> None:
    """Its error falls as (alpha / sigma)^(order + 1), as one step's should; of 3M with the next call, which mends it,
    and a step too small to matter."""

    def error(parts: int) -> float:
        times = [
            1.0,
            *(float(Flow().time(-torch.tensor(parts / 8.0, dtype=torch.float64).log() + d)) for d in (0, 1e-9)),
        ]
        grid = at(Flow(), times if solver.name == "dpmpp_3m" else times[:2])
        return distance(solve(solver, LAW.denoise, X, grid), flown(LAW, X, grid.nodes[0], grid.nodes[-1]))

    assert slope(error) == pytest.approx(order + 1, abs=0.15)


@pytest.mark.system("dpm-solver", "dpm-solver-pp", "unipc")
@pytest.mark.parametrize("calls", [10, 12, 15])
def test_ten_to_fifteen_calls_come_closer_than_ddim(calls: int) -> None:
    """On the log-SNR grid of the paper, most of a bent law's way from noise to clean."""

    def error(solver: Solver) -> float:
        grid = spaced(Preserving(), calls // solver.calls, "lam", -4, 4)
        x = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return distance(solve(solver, LAW.denoise, x, grid), flown(LAW, x, grid.nodes[0], grid.nodes[-1]))

    ddim = error(named("ddim"))
    assert error(named("dpm_solver", order=3)) < 0.8 * ddim
    assert error(named("dpmpp_2s")) < 0.6 * ddim
    for name in ("dpmpp_2m", "dpmpp_3m", "unipc"):
        assert error(named(name)) < 0.25 * ddim


@pytest.mark.system("dpm-solver-pp")
def test_under_strong_guidance_steps_in_x0_stay_where_steps_in_eps_leave() -> None:
    """Ten calls at scale 7.5. Data prediction is what DPM-Solver++ was made for: Lu et al. 2022, sec. 3."""
    cond = Gaussian(mean=1.0, var=0.1)

    def guided(x: Tensor, n: Node) -> Prediction:
        u, c = LAW.denoise(x, n), cond.denoise(x, n)
        return Prediction(x, u.x0 + 7.5 * (c.x0 - u.x0), u.eps + 7.5 * (c.eps - u.eps))

    def run(name: str, steps: int) -> Tensor:
        times = [1 - i / steps for i in range(steps + 1)]
        return solve(named(name), guided, x, at(Preserving(), times))

    x = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = run("unipc", 1000)
    off = {name: float((run(name, 10 // named(name).calls) - truth).abs().max()) for name in (
        "ddim", "dpm_solver", "dpmpp_2s", "dpmpp_2m",
    )}  # fmt: skip
    assert off["dpmpp_2m"] < 0.8 * off["ddim"]
    assert off["dpmpp_2s"] < 0.4 * off["dpm_solver"]
    assert off["dpm_solver"] > 2 * truth.abs().max()


def test_an_edit_is_added_to_what_unipc_corrects() -> None:
    """The same edits, told through p.x: the corrected state is the edited one and the correction, which at order one is
    alpha (e^-h - 1) (x0_then - x0) / 2."""
    path, grid = Flow(), spaced(Flow(), 2, "lam")
    first, middle, last = grid.nodes
    steps = named("unipc", order=1)(X, grid)
    x, _ = next(steps)
    p = LAW.denoise(x, first)
    x, _ = steps.send(p)
    edited = x + 0.3
    q = LAW.denoise(edited, middle)
    with pytest.raises(StopIteration) as end:
        steps.send(q)
    h = middle.lam - first.lam
    state = edited + middle.alpha * expm1(-h) * (p.x0 - q.x0) / 2
    want = last.sigma / middle.sigma * state - last.alpha * expm1(middle.lam - last.lam) * q.x0
    assert (end.value.value - want).abs().max() < 1e-14
    assert path == grid.path
