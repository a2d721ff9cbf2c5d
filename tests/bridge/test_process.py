"""What diffusers' schedulers stand for, read from their configuration: stepped by hand around one arbitrary network,
they and hasten's solvers give the same sample."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from families_video import cosine
from hasten import tree
from hasten.bridge.process import process
from hasten.bridge.scheduler import SolverScheduler
from hasten.denoiser import Prediction
from hasten.grid import at

SOLVERS = tree.functions("solvers")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V, FLOW = {"prediction_type": "v_prediction"}, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} | V
SVD = {"timestep_type": "continuous", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0} | V
AUDIO = {"sigma_data": 1.0, "sigma_max": 500.0, "sigma_min": 0.3, "sigma_schedule": "exponential"} | V


def scheduler(name: str, **config: Any) -> Any:
    table = not name.startswith(("Flow", "EDM", "Cosine"))
    return getattr(diffusers, f"{name}Scheduler")(**(BETAS if table else {}) | config)


def network(z: Tensor, time: Any) -> Tensor:
    """Of no law: what it says depends on what it sees and is told, smoothly."""
    told = torch.as_tensor(time, dtype=torch.float32)
    told = told / 1000 if told > 2 else told
    return 0.7 * torch.sin(1.3 * z + 0.4) - 0.5 * torch.cos(2 * told) + 0.1 * z


def pipeline(scheduler: Any, steps: int, *, setting: dict[str, Any] | None = None, **step: Any) -> Tensor:
    """The loop that every pipeline has."""
    setting = {"num_inference_steps": steps} if setting is None else setting
    scheduler.set_timesteps(**setting)
    x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        z = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(z, t), t, x, **step).prev_sample
    return x


FIRST_ORDER: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIM", {"clip_sample": False}),
    "ddim v": ("DDIM", {"clip_sample": False} | V),
    "ddim x0": ("DDIM", {"clip_sample": False, "prediction_type": "sample"}),
    "ddim that keeps noise": ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim whose last step stands still": ("DDIM", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim from pure noise": ("DDIM", {"clip_sample": False} | ZERO),
    "ddim clipped": ("DDIM", {"clip_sample": True, "clip_sample_range": 0.8} | V),
    "euler": ("EulerDiscrete", {}),
    "euler v": ("EulerDiscrete", {"timestep_spacing": "trailing"} | V),
    "euler leading": ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler karras": ("EulerDiscrete", {"use_karras_sigmas": True}),
    "euler exponential": ("EulerDiscrete", {"use_exponential_sigmas": True}),
    "euler beta": ("EulerDiscrete", {"use_beta_sigmas": True}),
    "euler that keeps noise": ("EulerDiscrete", {"final_sigmas_type": "sigma_min"}),
    "euler from pure noise": ("EulerDiscrete", ZERO),
    "svd": ("EulerDiscrete", SVD),
    "edm": ("EDMEuler", {}),
    "edm v": ("EDMEuler", {"sigma_data": 1.0, "sigma_schedule": "exponential"} | V),
    "audio": ("EDMDPMSolverMultistep", {"solver_order": 1} | AUDIO),
    "dpm 1": ("DPMSolverMultistep", {"solver_order": 1, "use_karras_sigmas": True}),
    "dpm 1 flow": ("DPMSolverMultistep", {"solver_order": 1, "flow_shift": 3.0} | FLOW),
    "flow": ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    "flow karras": ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}),
    "flow exponential": ("FlowMatchEulerDiscrete", {"use_exponential_sigmas": True}),
    "flow beta": ("FlowMatchEulerDiscrete", {"use_beta_sigmas": True, "shift": 2.0}),
    "flow told the signal": ("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
    "cogvideox": ("CogVideoXDDIM", {"snr_shift_scale": 2.0} | ZERO),
}


@pytest.mark.parametrize("case", FIRST_ORDER)
def test_a_schedulers_own_first_order_sample_is_ddims(case: str) -> None:
    """diffusers' DPM-Solver tells its network whole steps, and so differs by up to half a step of time."""
    name, config = FIRST_ORDER[case]
    step = {"use_clipped_model_output": True} if case == "ddim clipped" else {}
    theirs = pipeline(scheduler(name, **config), 10, **step)
    ours = pipeline(SolverScheduler(scheduler(name, **config), SOLVERS["ddim"]), 10)
    assert (ours - theirs).abs().max() < (5e-4 if case.startswith("dpm") else 2e-5) * theirs.abs().max()


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_flow_that_pipelines_shift_by_size_is_followed(kind: str) -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": 0.02}
    setting = {"sigmas": [1.0, 0.8, 0.5, 0.2], "mu": 0.9}
    theirs = pipeline(scheduler("FlowMatchEulerDiscrete", **config), 4, setting=setting)
    ours = SolverScheduler(scheduler("FlowMatchEulerDiscrete", **config), SOLVERS["ddim"])
    assert (pipeline(ours, 4, setting=setting) - theirs).abs().max() < 1e-5
    assert len(ours.timesteps) == 4
    assert float(ours.sigmas[-2]) == pytest.approx(0.02, abs=1e-6)


SAME_LIMIT: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistep", {}),
    "unipc flow": ("UniPCMultistep", {"flow_shift": 3.0} | FLOW),
    "dpm++": ("DPMSolverMultistep", V),
    "dpm++ sana": ("DPMSolverMultistep", {"flow_shift": 3.0} | FLOW),
    "dpm++ single": ("DPMSolverSinglestep", {"solver_order": 2, "use_karras_sigmas": True}),
    "deis": ("DEISMultistep", {}),
    "sa": ("SASolver", {"tau_func": lambda _: 0}),
    "edm dpm++": ("EDMDPMSolverMultistep", {}),
    "heun": ("HeunDiscrete", {}),
    "kdpm2": ("KDPM2Discrete", {}),
    "lms": ("LMSDiscrete", {"use_karras_sigmas": True}),
    "pndm": ("PNDM", {"skip_prk_steps": True, "steps_offset": 1}),
    "flow heun": ("FlowMatchHeunDiscrete", {"shift": 3.0}),
}


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # within diffusers' schedulers
@pytest.mark.parametrize("case", SAME_LIMIT)
def test_with_many_steps_a_scheduler_and_hasten_reach_the_same(case: str) -> None:
    """Other formulas, one equation: at 100 steps both are close to where its flow ends, and a wrong target, scale or
    clock is not."""
    name, config = SAME_LIMIT[case]
    theirs = pipeline(scheduler(name, **config), 100)
    ours = pipeline(SolverScheduler(scheduler(name, **config), SOLVERS["unipc"]), 100)
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()


DDPM: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("small", {"variance_type": "fixed_small", "clip_sample": False} | V),
    "large": ("large", {"variance_type": "fixed_large", "clip_sample": False}),
    "clipped": ("small", {"clip_sample_range": 0.7}),
    "learned": ("learned", {"variance_type": "learned_range", "clip_sample": False} | V),
}


@pytest.mark.parametrize("case", DDPM)
def test_ancestral_ddpm_of_one_generator_is_hastens(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it learned a variance the network says twice the channels. (Were its last time above step 0, diffusers
    would add noise in the step that ends clean.)"""
    variance, config = DDPM[case]
    one = network
    if variance == "learned":
        monkeypatch.setitem(globals(), "network", lambda z, t: torch.cat([one(z, t), torch.sin(3 * z)], 1))
    base = scheduler("DDPM", **config)
    solver, rng = SOLVERS["ddpm"].given(variance=variance), torch.Generator()
    ours = pipeline(SolverScheduler(base, solver), 10, generator=rng.manual_seed(4))
    theirs = pipeline(base, 10, generator=rng.manual_seed(4))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_stable_audios_own_scheduler_of_the_same_noise_is_sde_dpmpp_2m(monkeypatch: pytest.MonkeyPatch) -> None:
    base, rng = cosine(), torch.Generator()
    monkeypatch.setitem(
        type(base).step.__globals__,
        "BrownianTreeNoiseSampler",
        lambda like, **_: lambda *_: torch.randn(like.shape, generator=rng),
    )
    ours = pipeline(SolverScheduler(base, SOLVERS["sde_dpmpp_2m"]), 12, generator=rng.manual_seed(4))
    rng.manual_seed(4)
    theirs = pipeline(base, 12)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_predictions_are_read_as_the_scheduler_reads_them() -> None:
    """EDM's and Stable Audio's preconditioning, at every noise: x0, and the network's time."""
    for base in (scheduler("EDMEuler"), scheduler("EDMEuler", sigma_data=0.3, **V), cosine()):
        base.set_timesteps(7)
        known = process(base)
        x, out = torch.tensor([[0.4], [-1.1]]), torch.tensor([[0.2], [0.9]])
        for sigma, told in zip(base.sigmas[:-1], base.timesteps, strict=True):
            node = at(known.path, [known.times(sigma[None])[0], 0.0]).nodes[0]
            p: Prediction = known.read(out, base.precondition_inputs(x, sigma), node)
            assert torch.allclose(known.unit * p.x0, base.precondition_outputs(x, out, sigma), atol=1e-5)
            assert known.timestep(node.t) == pytest.approx(float(told), abs=1e-5)
            assert known.level(node) == pytest.approx(float(sigma), rel=1e-5)
            assert known.t(known.timestep(node.t)) == pytest.approx(node.t, abs=1e-9)


def test_schedulers_that_no_solver_can_stand_in_for_are_refused_in_one_line() -> None:
    for base, said in (
        (scheduler("DDPM", thresholding=True), "thresholds dynamically"),
        (diffusers.IPNDMScheduler(), "neither flow matching"),
        (diffusers.VQDiffusionScheduler(8), "neither flow matching"),
    ):
        with pytest.raises(ValueError, match=said) as told:
            process(base)
        assert "\n" not in str(told.value)
    loud = scheduler("FlowMatchEulerDiscrete", use_karras_sigmas=True)
    loud.register_to_config(sigma_max=80.0)  # as Cosmos has it
    with pytest.raises(ValueError, match="noise in"):
        SolverScheduler(loud, SOLVERS["ddim"]).set_timesteps(5)


@pytest.mark.parametrize("steps", [1, 2, 5, 31, 100])
def test_steps_asked_are_steps_run(steps: int) -> None:
    """Also where times repeat, and where they crowd at an end; but for a last one that changes nothing."""
    still = {"clip_sample": False, "set_alpha_to_one": False}
    for name, config, spared in (
        ("DDIM", still | {"steps_offset": 1}, 0),
        ("DDIM", still, 1),
        ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": True}, 0),
        ("DPMSolverMultistep", {"use_karras_sigmas": True}, 0),
        ("EulerDiscrete", {"use_beta_sigmas": True}, 0),
    ):
        ours = SolverScheduler(scheduler(name, **config), SOLVERS["ddim"])
        ours.set_timesteps(steps)
        assert len(ours.timesteps) == max(1, steps - spared), (name, steps)
