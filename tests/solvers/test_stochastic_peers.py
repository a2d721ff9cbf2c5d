"""SDE-DPM-Solver++, SA-Solver and EDM's churn beside diffusers, on the same noise; and where it differs, the law."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from affine import Recorded, exact
from hasten.bridge.process import process
from hasten.denoiser import Prediction
from hasten.grid import Grid, Node, at
from hasten.paths.edm import EDM
from hasten.reference.laws import Gaussian, Mixture
from hasten.solvers.drive import solve
from hasten.solvers.edm import edm
from hasten.solvers.exponential import moments as integrals
from hasten.solvers.sa_solver import sa_solver
from hasten.solvers.sde_dpmpp_2m import sde_dpmpp_2m
from hasten.solvers.sde_dpmpp_3m import sde_dpmpp_3m

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
LAW = Mixture()


def started() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def drawn(seed: int) -> Any:
    """Noise of a generator, in the order it is asked for: what diffusers draws."""
    rng = torch.Generator().manual_seed(seed)
    return lambda start, stop, like: torch.randn(like.shape, generator=rng, dtype=like.dtype)


def network(x: Tensor, n: Node) -> Tensor:
    return LAW.denoise(x.double(), n).eps.float()


def denoise(x: Tensor, n: Node) -> Prediction:
    return Prediction.of("eps", network(x, n), x, n)


@pytest.mark.system("dpm-solver-pp")
def test_sde_dpmpp_2m_equals_diffusers() -> None:
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=2, euler_at_final=True, final_sigmas_type="zero"
    )
    theirs.set_timesteps(12)
    known, rng = process(theirs), torch.Generator().manual_seed(6)
    grid = at(known.path, [known.t(t) for t in theirs.timesteps.tolist()] + [0.0])
    y = x = started()
    for t, n in zip(theirs.timesteps, grid.nodes, strict=False):
        y = theirs.step(network(y, n), t, y, generator=rng).prev_sample
    assert (solve(sde_dpmpp_2m, denoise, x, grid, drawn(6)) - y).abs().max() < 1e-4


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (3, 4), (4, 4)])
def test_sa_solver_equals_diffusers(predictor: int, corrector: int, tau: float) -> None:
    """It always rescales steps of two points (appendix D of the paper), and ends at its table's least noise."""
    from diffusers import SASolverScheduler

    theirs = SASolverScheduler(
        **BETAS, predictor_order=predictor, corrector_order=corrector, tau_func=lambda t: tau, lower_order_final=False
    )
    theirs.set_timesteps(12)
    known, rng = process(theirs), torch.Generator().manual_seed(6)
    grid = at(known.path, [known.t(t) for t in theirs.timesteps.tolist()] + [known.t(0)])
    y = x = started()
    for t, n in zip(theirs.timesteps, grid.nodes, strict=False):
        y = theirs.step(network(y, n), t, y, generator=rng).prev_sample
    ours = sa_solver.given(predictor=predictor, corrector=corrector, tau=tau, rescaled=True)
    # four points and noise diverge in 12 steps, in both alike: to 70 from 2
    assert (solve(ours, denoise, x, grid, drawn(6)) - y).abs().max() < 1e-4 * y.abs().max().clamp_min(1)


def parabola(x: Tensor, n: Node) -> Prediction:
    """x0 follows a parabola in lam, whatever the state."""
    x0 = torch.full_like(x, 0.3 + 0.5 * n.lam - 0.2 * n.lam**2)
    return Prediction(x, x0, (x - n.alpha * x0) / n.sigma)


def parabola_exact(x: Tensor, now: Node, after: Node, tau: float) -> Tensor:
    """The solution without its noise, by the moments of the kernel over all of the interval at once."""
    rate, h = 1 + tau**2, after.lam - now.lam
    c = 0.3 + 0.5 * now.lam - 0.2 * now.lam**2, (0.5 - 0.4 * now.lam) * h, -0.2 * h**2
    inner = sum(a * m for a, m in zip(c, integrals(rate * h, 2), strict=True))
    return x * after.sigma / now.sigma * math.exp(-(tau**2) * h) + after.alpha * inner


@pytest.mark.system("dpm-solver-pp")
def test_sde_dpmpp_3m_integrates_a_parabola_exactly_and_diffusers_does_not() -> None:
    """Two differences. D2 = (D1_0 - D1_1) / (r0 + r1) is half of the second derivative that it stands for (Newton's
    formula), in diffusers and in k-diffusion; and with e = 2h diffusers weighs it by (1 - exp(-e) - e) / e^2 - 1/2,
    where half the integral e int_0^1 exp(-e (1 - u)) u^2 du is the same + 1/2. The second adds - alpha' D2 to every
    step. The judge is the exact solution for x0 on a parabola: one step after two that are left to ours, no noise."""
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++", solver_order=3)
    theirs.set_timesteps(12)
    known = process(theirs)
    nodes = at(known.path, [known.t(t) for t in theirs.timesteps.tolist()]).nodes[4:8]
    x = torch.zeros(1, 1, dtype=torch.float64)

    states = [x]  # ours, step after step; the third is the first of third order
    for now, after in itertools.pairwise(nodes):
        states.append(parabola_exact(states[-1], now, after, 1.0))
    ours = solve(sde_dpmpp_3m, parabola, x, Grid(nodes), Recorded())
    start_error = solve(sde_dpmpp_3m, parabola, x, Grid(nodes[:3]), Recorded()) - states[2]
    decay = nodes[3].sigma / nodes[2].sigma * math.exp(nodes[2].lam - nodes[3].lam)
    assert abs(float(ours - states[3] - decay * start_error)) < 1e-12

    theirs.model_outputs = [parabola(x, n).x0 for n in nodes[:3]]
    theirs._step_index = 6
    y = theirs.multistep_dpm_solver_third_order_update(theirs.model_outputs, sample=states[2], noise=torch.zeros(1, 1))
    step = nodes[3].lam - nodes[2].lam
    e, d2 = 2 * step, -0.2 * step**2
    right, half = integrals(e, 2)[2], integrals(e, 2)[2] / 2
    assert (1 - math.exp(-e) - e) / e**2 + 1 / 2 == pytest.approx(half, rel=1e-9)
    assert float(y - states[3]) == pytest.approx(nodes[3].alpha * d2 * (half - 1 - right), rel=1e-4)
    assert abs(float(y - states[3])) > 0.01


@pytest.mark.system("edm")
@pytest.mark.parametrize("churn", [0.0, 3.0, 100.0])
def test_edm_equals_diffusers_where_the_network_is_asked_at_the_raised_noise(churn: float) -> None:
    """Its scheduler raises the noise inside `step`, after the network was asked; given what the network says at the
    raised state, as algorithm 2 has it, it takes the same Euler step."""
    from diffusers import EDMEulerScheduler

    theirs = EDMEulerScheduler(sigma_max=20.0)
    theirs.set_timesteps(8)
    path, told = EDM(80.0), {"s_churn": churn, "s_tmin": 0.05, "s_tmax": 15.0, "s_noise": 1.003}
    grid = at(path, [s / 80 for s in theirs.sigmas.tolist()])
    y = x = started() * 20
    rng, again = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
    for t, n in zip(theirs.timesteps, grid.nodes, strict=False):
        theirs.scale_model_input(y, t)
        gamma = min(churn / 8, 2**0.5 - 1) if 0.05 <= n.sigma <= 15 else 0.0
        (up,) = grid.met([n.lam - math.log(1 + gamma)])
        z = torch.randn(y.shape, generator=again) if gamma else torch.zeros(())
        raised = y + 1.003 * max(0.0, up.sigma**2 - n.sigma**2) ** 0.5 * z
        x0 = LAW.denoise(raised, up).x0
        y = theirs.step(x0, t, y, **told, generator=rng, pred_original_sample=x0).prev_sample
    ours = solve(edm.given(**told, order=1), LAW.denoise, x, grid, drawn(6))
    assert (ours - y).abs().max() < 1e-4


@pytest.mark.system("edm")
def test_diffusers_churn_in_a_pipeline_loses_the_mean_however_many_the_steps() -> None:
    """A difference. Asked before the noise is raised, the network's answer does not fit the raised state that it is
    used with. The judge is a Gaussian of mean 0.7: theirs comes to 0.63 in 64 steps and in 256."""
    from diffusers import EDMEulerScheduler

    law, size = Gaussian(0.7, 0.25), 20_000
    for steps in (64, 256):
        theirs, rng = EDMEulerScheduler(sigma_max=20.0, sigma_data=1.0), torch.Generator().manual_seed(6)
        theirs.set_timesteps(steps)
        grid = at(EDM(80.0), [s / 80 for s in theirs.sigmas.tolist()])
        mean, var = exact(law, grid.nodes[0])
        y = x = mean + var**0.5 * torch.randn(size, 1, generator=rng)
        for t, n in zip(theirs.timesteps, grid.nodes, strict=False):
            theirs.scale_model_input(y, t)
            said = (law.denoise(y, n).x0 - y / (n.sigma**2 + 1)) * (n.sigma**2 + 1) ** 0.5 / n.sigma  # as it reads it
            y = theirs.step(said, t, y, s_churn=110.0, generator=rng).prev_sample
        ours = solve(edm.given(s_churn=110.0), law.denoise, x, grid, drawn(7))
        assert abs(float(ours.mean()) - law.mean) < 0.02
        assert abs(float(ours.var()) - law.var) < 0.02
        assert abs(float(y.mean()) - law.mean) > 0.05
