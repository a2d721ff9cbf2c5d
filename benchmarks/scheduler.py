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

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)

from hasten import tree
from hasten.bridge.scheduler import SolverScheduler
from hasten.measure.machine import machine
from hasten.measure.timing import Spread

STEPS = 20
SHAPES = [(1, 4, 64, 64), (1, 16, 128, 128)]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
RESULT = Path(__file__).parent / "results" / "scheduler.json"


def vp():
    return DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")


def flow():
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


PEERS = {
    "ddim": (vp, vp),
    "euler": (flow, flow),
    "dpmpp_2m": (vp, lambda: DPMSolverMultistepScheduler(**BETAS, solver_order=2)),
    "unipc": (vp, lambda: UniPCMultistepScheduler(**BETAS, solver_order=2)),
    "heun": (vp, lambda: HeunDiscreteScheduler(**BETAS)),
    "ipndm": (vp, IPNDMScheduler),
}
"""Solver: the base it stands on in hasten, and diffusers' scheduler of that name."""


def main(pairs=60):
    rows = [measure(name, shape, pairs) for name in PEERS for shape in SHAPES]
    found = {"pairs": pairs, "steps": STEPS, "machine": machine(), "schedulers": rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(f"{row['solver']:9} {row['shape']!s:18} {row['theirs_us']:7.0f} us  {row['ours_us']:7.0f} us a call   "
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
