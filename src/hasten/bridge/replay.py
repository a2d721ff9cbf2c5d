"""A pipeline's denoiser, taken out of it: the same network, conditioning and guidance, at any state and time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten import tree
from hasten.bridge.pipelines import networks
from hasten.bridge.process import Line, Process
from hasten.bridge.scheduler import SolverScheduler
from hasten.denoiser import denoiser
from hasten.grid import build
from hasten.patch import Patch
from hasten.path import Path

STEPS = 8
"""Of the run that is watched; its first two evaluations are made."""

CLOSE = 2e-3
"""How far, relative, a replayed answer may lie from the pipeline's own."""


class CannotReplay(ValueError):
    """A pipeline whose denoiser can't be taken out of it: which part, and what to do."""


class _Enough(Exception):
    """Leaves the pipeline once enough was seen."""


@dataclass(frozen=True)
class Replay:
    """What a pipeline does to a state between two steps.

    Attributes:
        denoise: guided as the pipeline guides; also differentiable, and for batches of times where rows allow.
        x: the noise that the pipeline starts from, [B, ...].
        process: path, target and clock of the pipeline's scheduler.
    """

    denoise: denoiser
    x: Tensor
    process: Process

    @property
    def path(self) -> Path:
        """That the states lie on."""
        return self.process.path


@dataclass
class _Seen:
    """One evaluation: the calls of the network, and what the pipeline made of them."""

    calls: list[tuple[nn.Module, dict[str, Any], Tensor]] = field(default_factory=list)
    state: Tensor | None = None
    said: Tensor | None = None
    timestep: float = 0.0


def replay(pipe: Any, **call: Any) -> Replay:
    """Watches two evaluations of `pipe(**call)`, takes out what is constant, and checks that it foretells the second.

    Works where the pipeline's answer is a weighted sum of the network's (none, one or two branches, batched or one
    after the other, any scale), the same at both evaluations.

    Raises:
        CannotReplay: where it is not; such a pipeline can be sampled, not fitted.
    """
    base = pipe.scheduler.base if isinstance(pipe.scheduler, SolverScheduler) else pipe.scheduler
    scheduler = SolverScheduler(base, tree.function("solvers", "ddim"), _even)
    known = scheduler.process
    if known.bound is not None:
        raise CannotReplay(f"{type(base).__name__} clips what the network sees: set its clip_sample to False to fit it")
    seen = _watched(pipe, scheduler, call)
    first, second = seen
    again = [_template(f, s, first, second) for f, s in zip(first.calls, second.calls, strict=True)]
    weights = _weights(first)

    def network(x: Tensor, t: Tensor) -> Tensor:
        if bool((t != t[0]).any()):
            raise CannotReplay("a replayed pipeline is asked at one time a call")
        now = t[0] if isinstance(known.told, Line) else float(t[0].detach())  # along a line, with its gradient
        answers = [part for one in again for part in _parts(one(x, known.timestep(now)), x)]
        mixed: Tensor = sum(w * a for w, a in zip(weights, answers, strict=True))  # type: ignore[assignment]
        return known.sign * mixed

    assert second.state is not None
    assert second.said is not None
    with torch.no_grad():
        t = torch.full(second.state.shape[:1], known.t(second.timestep))
        off = (network(second.state, t) - known.sign * second.said).norm() / second.said.norm()
    if not off < CLOSE:
        raise CannotReplay(
            f"{type(pipe).__name__} does more between two steps than call its network and guide (its answer is "
            f"foretold only to {float(off):.1e}): fit on a plain call, without callbacks, masks or guidance by step"
        )
    assert first.state is not None
    return Replay(denoiser(network, known.target), first.state, known)


def _even(path: Path, steps: int) -> Any:
    return build(path, tree.function("grids", "uniform"), steps)


def _watched(pipe: Any, scheduler: SolverScheduler, call: dict[str, Any]) -> tuple[_Seen, _Seen]:
    seen = [_Seen()]

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        here = seen[-1]
        here.state, here.said, here.timestep = sample.detach().float(), model_output.detach().float(), float(timestep)
        if len(seen) == 2:
            raise _Enough
        seen.append(_Seen())
        return SolverScheduler.step(scheduler, model_output, timestep, sample, *args, **kwargs)

    with Patch() as patch:
        for net in networks(pipe).values():
            patch.wrap(net, _note(net, seen))
        patch.set(scheduler, "step", step)
        patch.set(pipe, "scheduler", scheduler)
        try:
            pipe(**call | {"num_inference_steps": STEPS, "output_type": "latent"})
        except _Enough:
            return seen[0], seen[1]
    raise CannotReplay(f"{type(pipe).__name__} never called its scheduler's step twice")


def _note(net: nn.Module, seen: list[_Seen]) -> Callable[..., Any]:
    names = list(inspect.signature(net.forward).parameters)

    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs |= dict(zip(names, args, strict=False))
        out = forward(**kwargs)
        seen[-1].calls.append((net, kwargs, _sample(out)))
        return out

    return around


def _sample(out: Any) -> Tensor:
    """The tensor in what a network returns."""
    return out if isinstance(out, Tensor) else out[0]


def _template(first: Any, second: Any, a: _Seen, b: _Seen) -> Callable[[Tensor, Tensor | float], Tensor]:
    """(x, timestep) -> what this call of the network says, its other inputs as they were."""
    net, kwargs, _ = first
    assert a.state is not None
    assert b.state is not None
    place = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and _holds(v, a.state)), None)
    clock = next((k for k in kwargs if k in ("timestep", "timesteps", "t")), None)
    if place is None or clock is None:
        missing = "state" if place is None else "time"
        raise CannotReplay(f"among the inputs of {type(net).__name__} none is the {missing} of the step")
    told = [float(torch.as_tensor(k[clock]).reshape(-1)[0]) for k in (kwargs, second[1])]
    slope = (told[1] - told[0]) / (b.timestep - a.timestep)
    shift = told[0] - slope * a.timestep
    held, time = kwargs[place], kwargs[clock]

    def ask(x: Tensor, timestep: Tensor | float) -> Tensor:
        now = slope * timestep + shift
        stamp = torch.ones_like(time, dtype=torch.float32) * now if isinstance(time, Tensor) else float(now)
        return _sample(net(**kwargs | {place: _put(held, x), clock: stamp})).to(x.dtype)

    return ask


def _holds(held: Tensor, state: Tensor) -> bool:
    """Whether a network's input is the state, once or twice over, with or without channels of its own after it."""
    if held.ndim != state.ndim or len(held) % len(state):
        return False
    part = held[: len(state)][tuple(slice(0, n) for n in state.shape)]
    return part.shape == state.shape and torch.allclose(part.float(), state, rtol=1e-3, atol=1e-3)


def _put(held: Tensor, x: Tensor) -> Tensor:
    """`held` with x in the place of the state."""
    x = x.to(held.dtype).repeat(len(held) // len(x), *[1] * (x.ndim - 1))
    if x.shape == held.shape:
        return x
    (axis,) = [i for i, (a, b) in enumerate(zip(held.shape, x.shape, strict=True)) if a != b]
    return torch.cat([x, held.narrow(axis, x.shape[axis], held.shape[axis] - x.shape[axis])], axis)


def _parts(out: Tensor, x: Tensor) -> list[Tensor]:
    """The branches in an answer, each of the state's shape (a learned variance is left out)."""
    out = out[tuple(slice(0, n) for n in (len(out), *x.shape[1:]))]
    return list(out.split(len(x)))


def _weights(seen: _Seen) -> list[float]:
    """The numbers with which the pipeline adds up the branches, by least squares."""
    assert seen.state is not None
    assert seen.said is not None
    parts = [p.float() for _, _, out in seen.calls for p in _parts(out, seen.state)]
    columns = torch.stack([p.flatten() for p in parts], 1).double()
    found = torch.linalg.lstsq(columns, seen.said.flatten().double()[:, None], driver="gelsd").solution[:, 0]
    return [float(w) for w in found]


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Within, no weight of the pipeline's networks asks for a gradient: only what is fitted does."""
    weights = [p for net in networks(pipe).values() for p in net.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
