"""The one training loop, on Hugging Face accelerate: bf16, EMA, checkpoints, exact resume, progress."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hasten.objectives.objective import Batch, Objective
from hasten.train.ema import Ema


def train(
    objective: Objective,
    nets: dict[str, nn.Module],
    batch: Callable[[int, torch.Generator], Batch],
    *,
    optimizers: Callable[[list[nn.Module]], list[Optimizer]],
    rate: Callable[[int], float],
    until: int,
    folder: Path,
    seed: int = 0,
    decay: float = 0.999,
    every: int = 500,
    look: Callable[[int, dict[str, nn.Module]], None] | None = None,
    device: str | None = None,
    clip: float = 1.0,
) -> dict[str, nn.Module]:
    """Trains `nets` in place and returns them holding the averaged weights.

    A step's batch and noise depend on (seed, step) alone, so a run that was stopped and resumed from its checkpoint
    takes the same steps as one that was not. A checkpoint is written beside its final place and renamed, so none is
    ever half written.

    Args:
        batch: (step, rng) -> what the objective's loss reads.
        optimizers: from a phase's nets to its optimizers.
        rate: factor of the learning rate at a step.
        until: steps in all, those before a resume included.
        folder: where `checkpoint/` is kept, and found on the next run.
        decay: of the average.
        every: steps between checkpoints, and between calls of `look`.
        look: (step, nets holding the average) at each checkpoint: sample grids, held-out figures.
    """
    cpu = device == "cpu" or not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16", cpu=cpu)
    nets = {k: net.to(accelerator.device) for k, net in nets.items()}
    phases = objective.phases()
    movers = [[accelerator.prepare(o) for o in optimizers([nets[k] for k in p.trains])] for p in phases]
    rates = [LambdaLR(o.optimizer, rate) for group in movers for o in group]
    ema = Ema(nets, decay)
    for thing in (*nets.values(), *rates, ema):
        accelerator.register_for_checkpointing(thing)
    step = _resume(accelerator, folder)
    with _progress() as bar:
        task = bar.add_task(type(objective).__name__, total=until, completed=step, note="")
        while step < until:
            # one stream a step: 2^20 steps a seed before two seeds meet
            rng = torch.Generator(accelerator.device).manual_seed((seed << 20) + step)
            data = {k: v.to(accelerator.device) for k, v in batch(step, rng).items()}
            losses = [_move(accelerator, p.loss, nets, data, rng, m, clip) for p, m in zip(phases, movers, strict=True)]
            for r in rates:
                r.step()
            ema.update(nets)
            step += 1
            if step % 10 == 0:
                note = " ".join(f"{float(x):.4f}" for x in losses)
                bar.update(task, completed=step, note=note)
                if not bar.console.is_terminal and step % 100 == 0:
                    bar.console.print(f"step {step} loss {note}", highlight=False)
            if step % every == 0 or step == until:
                _save(accelerator, folder, step)
                if look is not None:
                    _with_average(nets, ema, lambda: look(step, nets))  # noqa: B023
    ema.copy_to(nets)
    return nets


def _move(
    accelerator: Accelerator,
    loss: Callable,
    nets: dict,
    data: Batch,
    rng: torch.Generator,
    movers: Sequence[Optimizer],
    clip: float,
) -> torch.Tensor:
    with accelerator.autocast():
        value = loss(nets, data, rng)
    accelerator.backward(value)
    params = [p for o in movers for g in o.param_groups for p in g["params"]]
    accelerator.clip_grad_norm_(params, clip)
    for o in movers:
        o.step()
        o.zero_grad()
    return value.detach()


def _with_average(nets: dict[str, nn.Module], ema: Ema, then: Callable[[], None]) -> None:
    raw = {k: [p.detach().clone() for p in net.parameters()] for k, net in nets.items()}
    ema.copy_to(nets)
    try:
        then()
    finally:
        with torch.no_grad():
            for k, net in nets.items():
                for p, old in zip(net.parameters(), raw[k], strict=True):
                    p.copy_(old)


def _save(accelerator: Accelerator, folder: Path, step: int) -> None:
    fresh, kept, old = folder / f".checkpoint-{os.getpid()}", folder / "checkpoint", folder / "checkpoint.old"
    accelerator.save_state(str(fresh), safe_serialization=True)
    (fresh / "step").write_text(str(step))
    shutil.rmtree(old, ignore_errors=True)
    if kept.exists():
        kept.rename(old)
    fresh.rename(kept)
    shutil.rmtree(old, ignore_errors=True)


def _resume(accelerator: Accelerator, folder: Path) -> int:
    """The step to go on from: that of `checkpoint`, or of `checkpoint.old` if a kill fell between the two renames."""
    for name in ("checkpoint", "checkpoint.old"):
        if (folder / name / "step").exists():
            accelerator.load_state(str(folder / name))
            return int((folder / name / "step").read_text())
    return 0


def _progress() -> Progress:
    return Progress(
        *Progress.get_default_columns()[:3],
        TimeRemainingColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[note]}"),
    )
