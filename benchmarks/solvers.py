"""Every solver on every fixed grid, fitted grids, and diffusers' own schedulers, at 4 to 20 network calls, in one run.

    python benchmarks/solvers.py [mixture] [emoji-flow]      writes benchmarks/results/solvers-*.json, and goes on

On an analytic mixture in 64 dimensions, and on `emoji-flow` at its default guidance through its real pipeline. The
error is the distance from the end of the exact trajectory (500 steps of Heun on the mixture, 250 on emoji-flow: 500
calls) of the same noise, over its norm, mean over samples; a guided call counts once. The Frechet distance of end
states is to exact samples of the law, or to the exact trajectories' latents. Stochastic solvers have no trajectory:
the distance alone. Then `python benchmarks/solvers.py plot` draws docs/pictures/solvers.png.
"""

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
from rich.progress import track
from torch import Tensor

from hasten import Recipe, accelerate, reference, tree
from hasten.atomic import write_text_atomically
from hasten.bridge.drawing import quiet
from hasten.bridge.replay import frozen, replay
from hasten.brownian import Brownian
from hasten.denoiser import denoiser
from hasten.fit.fit import Effort, fit
from hasten.fit.trajectory import Trajectory, record
from hasten.grid import at, build
from hasten.measure.frechet import Moments, frechet, frechet_small
from hasten.measure.machine import machine
from hasten.paths.flow import Flow
from hasten.solvers.drive import solve, visited

HERE = Path(__file__).parent
CALLS = (4, 5, 6, 8, 10, 15, 20)
GRIDS = {
    "uniform": "uniform", "shifted 0.5": {"shifted": {"shift": 0.5}}, "shifted 3": {"shifted": {"shift": 3.0}},
    "karras": "karras", "log_snr": "log_snr", "exponential": "exponential", "beta": "beta",
    "quadratic": "quadratic", "dm_nonuniform": "dm_nonuniform",
}  # fmt: skip
VARIANTS = {
    "dpm_solver": ({"order": 2}, {"order": 3}), "unipc": ({"order": 1}, {}, {"order": 3}),
    "deis": ({"order": 2}, {"order": 3}), "ipndm": ({"order": 2}, {"order": 3}, {"order": 4}),
    "lms": ({"order": 2}, {}),
}  # fmt: skip
"""Settings besides a solver's defaults that are well known by themselves."""

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
PEERS = {
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}),
    "FlowMatchEuler, shift 0.5": ("FlowMatchEulerDiscreteScheduler", {"shift": 0.5}),
    "FlowMatchEuler, shift 3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "FlowMatchEuler, karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "FlowMatchEuler, exponential": ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "FlowMatchEuler, beta": ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", FLOW),
    "DPM++ 2M, shift 0.5": ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 0.5}),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", FLOW | {"solver_order": 3}),
    "DPM++ 2S": ("DPMSolverSinglestepScheduler", FLOW),
    "UniPC 2": ("UniPCMultistepScheduler", FLOW),
    "UniPC 2, shift 0.5": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 0.5}),
    "UniPC 3": ("UniPCMultistepScheduler", FLOW | {"solver_order": 3}),
    "DEIS": ("DEISMultistepScheduler", FLOW), "SASolver": ("SASolverScheduler", FLOW),
    "DDIM": ("DDIMScheduler", {}), "Heun": ("HeunDiscreteScheduler", {}), "iPNDM": ("IPNDMScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}), "Euler": ("EulerDiscreteScheduler", {}),
    "EDMDPM++": ("EDMDPMSolverMultistepScheduler", {}), "PNDM": ("PNDMScheduler", {}),
}  # fmt: skip


class Kept:
    """Rows as they are found, kept after each."""

    def __init__(self, subject: str) -> None:
        self.subject, self.file = subject, HERE / "results" / f"solvers-{subject}.json"
        self.all = json.loads(self.file.read_text()) if self.file.exists() else {"machine": machine(), "rows": []}

    def add(self, key: dict, found: Callable[[], dict]) -> None:
        """Measures what is not there yet."""
        key = {"subject": self.subject, **key}
        if not any(all(row.get(k) == v for k, v in key.items()) for row in self.all["rows"]):
            self.all["rows"].append(key | found())
            self.file.parent.mkdir(exist_ok=True)
            write_text_atomically(
                self.file, json.dumps(self.all, indent=None).replace('{"subject"', '\n{"subject"') + "\n"
            )


def solvers() -> list[tuple[str, object]]:
    """(label, solver) of all that run on a given grid."""
    found = []
    for name, s in tree.functions("solvers").items():
        if s.unfit or s.few or s.fitted or (s.order == 0):
            continue
        for settings in VARIANTS.get(name, ({},)):
            more = "".join(f" {v}" for v in settings.values())
            found.append((name + more, s.given(**settings)))
    return found


def steps_of(solver, calls: int) -> int | None:
    """Steps that make exactly so many calls on a grid that ends clean; None where there are none."""
    for steps in range(1, calls + 1):
        try:
            if len(visited(solver, at(Flow(), [1 - i / steps for i in range(steps + 1)]))) == calls:
                return steps
        except ValueError:  # an order above the number of steps
            continue
    return None


def off(end: Tensor, want: Tensor) -> dict:
    each = (end.flatten(1) - want.flatten(1)).norm(dim=1) / want.flatten(1).norm(dim=1)
    return {"error": round(float(each.mean()), 5), "median": round(float(each.median()), 5)}


def measure(kept: Kept, denoise, x: Tensor, exact: Trajectory, distance: Callable, peers: Callable) -> None:
    """All rows of one subject: `distance` is the Frechet one of end states; `peers(name, calls)` runs diffusers'."""

    def row(end: Tensor, stochastic: bool = False) -> dict:
        fd = {"frechet": round(distance(end), 5)}
        return fd if stochastic else off(end, exact.x[-1]) | fd

    def ours(solver, grid: str, steps: int) -> dict:
        spacing, settings = Recipe.from_dict({"solver": "ddim", "grid": GRIDS[grid]}).spacing()
        laid = build(exact.grid.path, spacing, steps, **settings)
        with torch.no_grad():
            noise = Brownian([0]) if solver.stochastic else None
            return row(solve(solver, denoise, x, laid, noise), solver.stochastic)

    for calls in CALLS:
        for peer in PEERS:
            found = partial(row_or_reason, peers, peer, calls, row)
            kept.add({"who": "diffusers", "solver": peer, "calls": calls}, found)
        for label, solver in track(solvers(), f"{kept.subject}, {calls} calls"):
            steps = steps_of(solver, calls)
            for grid in GRIDS if steps else ():
                found = partial(ours, solver, grid, steps)
                kept.add({"who": "hasten", "solver": label, "grid": grid, "calls": calls}, found)


def row_or_reason(peers: Callable, peer: str, calls: int, row: Callable) -> dict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return row(peers(peer, calls))
    except Exception as error:  # what a peer raises is its answer
        return {"fails": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}


def fitted(denoise, x: Tensor, exact: Trajectory, calls: int, solver, held: int, search: int) -> dict:
    """Fitted on some rows of the same noise, judged on the others; the solver on fixed grids, on the same others."""
    found = fit(denoise, x, exact.grid.path, calls, solver, held=held, exact=exact,
                rng=torch.Generator().manual_seed(0), effort=Effort(search=search))  # fmt: skip
    return {"errors": {k: round(v, 5) for k, v in found.errors.items()}, "recipe": found.recipe.to_dict()}


def mixture() -> None:
    """Twenty narrow Gaussians in 64 dimensions on the straight path, in float64; 2,000 samples."""
    rng = torch.Generator().manual_seed(0)
    centres, var = torch.randn(20, 64, generator=rng, dtype=torch.float64), 0.05

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        a, s = 1 - t[:, None], t[:, None]
        spread = var * a**2 + s**2
        apart = x.square().sum(1, keepdim=True) - 2 * a * (x @ centres.T) + a**2 * centres.square().sum(1)
        mean = torch.softmax(-apart / (2 * spread), 1) @ centres
        x0 = mean + var * a / spread * (x - a * mean)
        return (x - a * x0) / s - x0

    denoise, x = denoiser(velocity, "flow"), torch.randn(2000, 64, generator=rng, dtype=torch.float64)
    draws = centres[torch.randint(20, (2000,), generator=rng)] + var**0.5 * torch.randn(2000, 64, generator=rng)
    exact = record(tree.function("solvers", "heun"), denoise, x, uniform(500)).thinned(100)

    def peers(name: str, calls: int) -> Tensor:
        kind, config = PEERS[name]
        base = {"num_train_timesteps": 1000, "shift": 1.0}
        cls = getattr(diffusers, kind)
        scheduler = cls(
            **{k: v for k, v in (base | config).items() if k in cls.__init__.__wrapped__.__code__.co_varnames}
        )
        if not ({"use_flow_sigmas"} & set(config) or kind.startswith("FlowMatch")):
            raise NotImplementedError("has no flow prediction")
        return stepped(scheduler, calls, x, lambda x, t: velocity(x, t))

    moments = Moments.of(draws)
    kept = Kept("mixture")
    for calls in CALLS:
        for name in (None, "euler", "dpmpp_2m", "unipc"):
            found = partial(fitted, denoise, x, exact, calls, name and tree.function("solvers", name), 1000, 60)
            kept.add({"who": "fitted", "solver": name or "olss", "calls": calls}, found)
    measure(kept, denoise, x, exact, lambda end: frechet(Moments.of(end), moments), peers)


def stepped(scheduler, calls: int, x: Tensor, velocity: Callable) -> Tensor:
    """A diffusers scheduler of exactly so many calls, told the velocity at the times that it names."""
    for steps in range(1, calls + 1):
        scheduler.set_timesteps(steps)
        if len(scheduler.timesteps) == calls:
            break
    else:
        raise ValueError(f"never makes {calls} calls")
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, (t / 1000).to(x.dtype).expand(len(x))), t, x, return_dict=False)[0]
    return x


def uniform(steps: int):
    return build(Flow(), tree.function("grids", "uniform"), steps)


def emoji(judged: int = 8, train: int = 16) -> None:
    """The pipeline as it is, guidance 7, on 8 prompts; fits are to 16 other prompts and judged on the same 8.
    `tokens.fold` (the same output up to rounding, faster) is under all of them."""
    pipe, count = quiet(reference.pipeline("emoji-flow")), judged + train
    names = reference.prompts(count=count)
    prompts = [n for i, n in enumerate(names) if i % 3 != 2] + names[2::3]
    accelerate(pipe, Recipe.from_dict({"methods": ["tokens.fold"]}))
    rngs = [torch.Generator().manual_seed(1000 + i) for i in range(count)]
    kept, own = Kept("emoji-flow"), pipe.scheduler

    def peers(name: str, calls: int) -> Tensor:
        kind, config = PEERS[name]
        try:
            pipe.scheduler = getattr(diffusers, kind).from_config(own.config, **config)
            for steps in range(1, calls + 1):
                pipe.scheduler.set_timesteps(steps)
                if len(pipe.scheduler.timesteps) == calls:
                    break
            else:
                raise ValueError(f"never makes {calls} calls")
            given = {"latents": few.x.clone(), "num_inference_steps": steps, "output_type": "latent"}
            return pipe(prompt=prompts[train:], **given).images
        finally:
            pipe.scheduler = own

    with frozen(pipe):
        few, many = (replay(pipe, prompt=prompts[i:], generator=rngs[i:]) for i in (train, 0))
        exact, wide = (exactly(*job) for job in (("emoji-8", few, 250), ("emoji-24", many, 100)))
        want = exact.x[-1].flatten(1)
        for calls in CALLS:
            found = partial(fitted, many.denoise, many.x, wide, calls, None, judged, 8)
            kept.add({"who": "fitted", "solver": "olss", "calls": calls}, found)
        measure(kept, few.denoise, few.x, exact, lambda end: frechet_small(end.flatten(1), want), peers)


def exactly(name: str, seen, steps: int) -> Trajectory:
    """The fine run, kept in out/ for a benchmark that goes on."""
    file, grid = HERE.parent / "out" / f"exact-{name}.pt", uniform(steps)
    if not file.exists():
        bar = track(range(2 * steps - 1), f"exact trajectories, {name}")
        ticks = iter(bar)
        run = record(tree.function("solvers", "heun"), seen.denoise, seen.x, grid, lambda n: next(ticks, None))
        file.parent.mkdir(exist_ok=True)
        torch.save((run.x, run.x0, run.eps), file)
    return Trajectory(grid, *torch.load(file))


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["mixture", "emoji-flow"]
    for name, job in {"mixture": mixture, "emoji-flow": emoji}.items():
        if name in wanted:
            job()
