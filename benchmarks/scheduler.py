"""What a step of hasten's scheduler costs, the network excluded, against diffusers' own scheduler of the same solver.

    python benchmarks/scheduler.py [PAIRS]      about a minute; writes benchmarks/results/scheduler.json

A ratio is diffusers' seconds over hasten's for a whole trajectory (`step`, and `scale_model_input` where pipelines call
it, on a fixed model output), pair by pair of interleaved runs: above 1, hasten is faster. `set_timesteps`, called once
a picture, is timed apart.
"""

import json
import sys
import time
from pathlib import Path

import diffusers
import torch

from hasten import tree
from hasten.bridge.scheduler import SolverScheduler
from hasten.measure.machine import machine
from hasten.measure.timing import Spread

STEPS = 20
SHAPES = [(1, 4, 64, 64), (1, 16, 128, 128)]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RESULT = Path(__file__).parent / "results" / "scheduler.json"


def vp(name="DDIM", **config):
    """One of diffusers' schedulers on Stable Diffusion's betas."""
    return lambda: getattr(diffusers, f"{name}Scheduler")(**BETAS | config)


def flow(name="Euler", **config):
    """One of its flow matching schedulers."""
    return lambda: getattr(diffusers, f"FlowMatch{name}Scheduler")(**{"shift": 3.0} | config)


EPS = vp(clip_sample=False, timestep_spacing="trailing")
FLOW = flow("EulerDiscrete")
PEERS = {
    "ddim": (EPS, EPS),
    "euler": (FLOW, FLOW),
    "dpmpp_2m": (EPS, vp("DPMSolverMultistep", solver_order=2)),
    "dpmpp_3m": (EPS, vp("DPMSolverMultistep", solver_order=3)),
    "dpmpp_2s": (EPS, vp("DPMSolverSinglestep", solver_order=2)),
    "dpm_solver": (
        EPS,
        vp("DPMSolverSinglestep", solver_order=2, algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    ),
    "unipc": (EPS, vp("UniPCMultistep", solver_order=2)),
    "deis": (EPS, vp("DEISMultistep", solver_order=3)),
    "heun": (EPS, vp("HeunDiscrete")),
    "edm": (EPS, vp("HeunDiscrete")),
    "midpoint": (EPS, vp("KDPM2Discrete")),
    "pndm": (EPS, vp("PNDM", skip_prk_steps=True)),
    "ipndm": (EPS, diffusers.IPNDMScheduler),
    "lms": (EPS, vp("LMSDiscrete")),
    "ddpm": (EPS, vp("DDPM", clip_sample=False)),
    "euler_ancestral": (EPS, vp("EulerAncestralDiscrete")),
    "sde_dpmpp_2m": (EPS, vp("DPMSolverMultistep", algorithm_type="sde-dpmsolver++")),
    "sde_dpmpp_3m": (EPS, vp("DPMSolverMultistep", algorithm_type="sde-dpmsolver++", solver_order=3)),
    "sa_solver": (EPS, vp("SASolver")),
    "consistency": (FLOW, flow("LCM")),
    "lcm": (EPS, vp("LCM", clip_sample=False)),
    "tcd": (EPS, vp("TCD", clip_sample=False)),
}
"""Solver: the base it stands on in hasten, and diffusers' scheduler of that name; `edm` without churn is Heun's, and
`midpoint` is KDPM2."""


def main(pairs=60):
    rows = [measure(name, shape, pairs) for name in PEERS for shape in SHAPES]
    found = {"pairs": pairs, "steps": STEPS, "machine": machine(), "schedulers": rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(f"{row['solver']:15} {row['shape']!s:18} {row['theirs_us']:7.0f} us  {row['ours_us']:7.0f} us a call   "
              f"ratio {Spread(**row['ratio'])}   set_timesteps {row['set_timesteps_ms']}")  # fmt: skip


def measure(name, shape, pairs):
    base, peer = PEERS[name]
    sides = SolverScheduler(base(), tree.function("solvers", name)), peer()
    rng = torch.Generator().manual_seed(0)
    x, out = (torch.randn(shape, generator=rng) for _ in range(2))
    scales = hasattr(sides[1], "scale_model_input")  # flow pipelines don't call it
    times = []
    for i in range(pairs + 5):
        order = (0, 1) if i % 2 else (1, 0)
        both = {side: trajectory(sides[side], x, out, scales) for side in order}
        times.append((both[0], both[1]))
    times = times[5:]  # the first ones warm up
    ratios = [theirs[1] / ours[1] for ours, theirs in times]
    setting, running = ([[pair[side][part] for pair in times] for side in (0, 1)] for part in (0, 1))
    calls = [len(s.timesteps) for s in sides]
    return {
        "solver": name, "peer": type(sides[1]).__name__, "shape": list(shape),
        "calls": {"ours": calls[0], "theirs": calls[1]},
        "ratio": Spread.of(ratios).to_dict(),
        "ours_us": round(1e6 * Spread.of(running[0]).median / calls[0], 1),
        "theirs_us": round(1e6 * Spread.of(running[1]).median / calls[1], 1),
        "set_timesteps_ms": {k: round(1e3 * Spread.of(s).median, 3) for k, s in zip(("ours", "theirs"), setting)},
    }  # fmt: skip


@torch.no_grad()
def trajectory(scheduler, x, out, scales):
    """(seconds of set_timesteps, seconds of the steps)."""
    start = time.perf_counter()
    scheduler.set_timesteps(STEPS)
    begun = time.perf_counter()
    for t in scheduler.timesteps:
        if scales:
            scheduler.scale_model_input(x, t)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return begun - start, time.perf_counter() - begun


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
